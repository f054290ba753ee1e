#include "scheduler/planner.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>

#include "scheduler/backward.h"
#include "scheduler/cut.h"
#include "scheduler/lower.h"
#include "scheduler/queue_order.h"
#include "scheduler/serialiser.h"
#include "scheduler/simulate.h"

namespace mla {

namespace {

constexpr int64_t kMaxInstructions = 1 << 20;

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

void check_problem(const Problem& problem) {
    check_shape(problem.num_heads, problem.new_tokens, problem.num_workers);
    for (int request = 0; request < problem.num_requests(); ++request) {
        require(problem.seq_lens[request] >= 1,
                "seq_lens[" + std::to_string(request) + "]: expected at least 1, got " +
                    std::to_string(problem.seq_lens[request]));
    }
    require(int64_t{problem.num_requests()} * problem.row_groups() <= kMaxInstructions,
            "seq_lens: " + std::to_string(problem.num_requests()) + " requests need more than " +
                std::to_string(kMaxInstructions) + " instructions");
}

struct Candidate {
    Cut cut;
    TaskGraph partials;
    std::vector<int32_t> partial_order;
    Timeline partial_timeline;  // as if there were no reductions

    TaskGraph graph;
    std::vector<int32_t> order;
    Timeline timeline;
};

Candidate draft(const Problem& problem, const CostModel& cost, Cut cut) {
    Candidate candidate;
    candidate.cut = std::move(cut);
    candidate.partials = lower_partials(problem, candidate.cut);
    candidate.partial_order = partial_order(problem, candidate.cut);
    candidate.partial_timeline =
        simulate(candidate.partials, candidate.partial_order, problem.num_workers, cost);
    return candidate;
}

// Adds the reductions. False, and unfinished, if the plan cannot end before `give_up_us`.
bool complete(const Problem& problem,
              const CostModel& cost,
              const SliceOptions& slices,
              double give_up_us,
              Candidate& candidate) {
    if (candidate.partial_timeline.makespan_us >= give_up_us) return false;
    candidate.graph = candidate.partials;
    lower_reductions(problem, cost, candidate.cut, slices, candidate.graph);
    const auto num_partials = static_cast<int>(candidate.partial_order.size());
    if (candidate.graph.tasks.size() == candidate.partial_order.size()) {
        candidate.order = candidate.partial_order;
        candidate.timeline = candidate.partial_timeline;
        return true;
    }
    const Forecast times =
        forecast(candidate.graph, num_partials, candidate.partial_timeline, cost);
    if (times.finish_us >= give_up_us) return false;
    candidate.order = merge_reductions(candidate.partial_order, candidate.graph, times);
    candidate.timeline =
        num_partials <= problem.num_workers
            ? simulate_reductions(candidate.graph,
                                  candidate.order,
                                  problem.num_workers,
                                  cost,
                                  candidate.partial_timeline)
            : simulate(candidate.graph, candidate.order, problem.num_workers, cost);
    return true;
}

Candidate evaluate(const Problem& problem,
                   const CostModel& cost,
                   Cut cut,
                   const SliceOptions& slices) {
    Candidate candidate = draft(problem, cost, std::move(cut));
    complete(problem, cost, slices, std::numeric_limits<double>::infinity(), candidate);
    return candidate;
}

// Tries cuts until its budget of simulated instructions is spent; keeps the best.
class Search {
  public:
    Search(const Problem& problem, const CostModel& cost) : problem_(problem), cost_(cost) {}

    Candidate run() {
        const int requests = problem_.num_requests();
        const int gangs = problem_.num_gangs();
        consider(cut_unsplit(problem_));

        // Gangs that run several pieces one after the other. With requests so few that each
        // has several gangs, one piece per gang has never been worse.
        if (2 * requests >= gangs) {
            for (const int min_tiles : {4, 1}) {
                for (const LineOrder line_order : {LineOrder::kLongestFirst, LineOrder::kGiven}) {
                    consider(cut_line(problem_, cost_, gangs, min_tiles, line_order));
                }
            }
            // More pieces than gangs, taken as gangs come free.
            if (requests < 2 * gangs) consider_even(2 * gangs);
        }
        // One wave: every piece on a gang of its own. Fewer pieces than gangs cost no
        // time where the memory is the limit, and are fewer to merge.
        int best_count = 0;
        for (const double share : {1.0, 0.85, 0.75, 0.65, 0.5}) {
            const int count = static_cast<int>(gangs * share);
            if (count <= requests) break;
            if (consider_even(count)) best_count = count;
        }
        consider_one_length(gangs);
        for (const double step : {0.05, 0.025, 0.0125}) {
            const int centre = best_count;
            for (const double factor : {1.0 - step, 1.0 + step}) {
                const int count = std::min(gangs, static_cast<int>(centre * factor + 0.5));
                if (count > requests && consider_even(count)) best_count = count;
            }
        }
        if (best_count > kMaxReductionInputs) {
            consider(cut_even(problem_, cost_, best_count, TreeShape::kLevels));
        }
        refine_slices();
        return std::move(*best_);
    }

  private:
    // Simulated instructions, for the cuts and then for their slices. Keeps the planning
    // of 128 requests under a millisecond.
    static constexpr int64_t kCutBudget = 2500;
    static constexpr int64_t kSliceBudget = 3000;
    // Even a huge batch gets these: whole requests, and the first two lines.
    static constexpr int kMinCuts = 3;
    // A plan with more instructions has to win by this much for each.
    static constexpr double kInstructionPenaltyUs = 0.001;

    static double score_us(const Candidate& candidate) {
        return candidate.timeline.makespan_us +
               kInstructionPenaltyUs * static_cast<double>(candidate.graph.tasks.size());
    }

    bool out_of_budget(int64_t budget) const { return num_cuts_ >= kMinCuts && spent_ >= budget; }

    // True if it is the best so far.
    bool consider(Cut cut) {
        if (cut.pieces.empty() || out_of_budget(kCutBudget) || !is_new(cut)) return false;
        ++num_cuts_;
        Candidate candidate = draft(problem_, cost_, std::move(cut));
        spent_ += static_cast<int64_t>(candidate.partials.tasks.size());
        return keep_if_better({}, std::move(candidate));
    }

    bool consider_even(int max_pieces) {
        if (out_of_budget(kCutBudget)) return false;
        return consider(cut_even(problem_, cost_, max_pieces, TreeShape::kStaggered));
    }

    // One wave again, but every piece as long as any other: the shortest length that leaves at
    // most `max_pieces` of them, and somewhat longer ones.
    void consider_one_length(int max_pieces) {
        if (problem_.num_requests() > max_pieces) return;
        int longest = 0;
        for (int request = 0; request < problem_.num_requests(); ++request) {
            longest = std::max(longest, problem_.num_tiles(request));
        }
        int shortest = 1;
        for (int too_long = longest; shortest < too_long;) {
            const int middle = shortest + (too_long - shortest) / 2;
            if (num_pieces_of_length(middle) <= max_pieces) {
                too_long = middle;
            } else {
                shortest = middle + 1;
            }
        }
        int previous = 0;
        for (const double factor : {1.0, 1.12, 1.25}) {
            const int tiles = std::max(previous + 1, static_cast<int>(shortest * factor + 0.5));
            if (tiles >= longest || out_of_budget(kCutBudget)) return;
            consider(cut_fixed(problem_, tiles));
            previous = tiles;
        }
    }

    int64_t num_pieces_of_length(int tiles) const {
        int64_t pieces = 0;
        for (int request = 0; request < problem_.num_requests(); ++request) {
            pieces += ceil_div(problem_.num_tiles(request), tiles);
        }
        return pieces;
    }

    bool keep_if_better(const SliceOptions& slices, Candidate candidate) {
        const double best_us = best_ ? score_us(*best_) : std::numeric_limits<double>::infinity();
        if (!complete(problem_, cost_, slices, best_us, candidate)) return false;
        spent_ += static_cast<int64_t>(candidate.graph.tasks.size());
        if (score_us(candidate) >= best_us) return false;
        best_ = std::move(candidate);
        return true;
    }

    void refine_slices() {
        if (best_->graph.inputs.empty()) return;
        for (const int direction : {1, -1}) {
            for (int scale = direction; !out_of_budget(kSliceBudget); scale += direction) {
                if (!keep_if_better({false, scale}, *best_)) break;
            }
        }
    }

    // Candidates often coincide; two with equal pieces are one.
    bool is_new(const Cut& cut) {
        constexpr uint64_t kFnvOffset = 0xcbf29ce484222325;
        constexpr uint64_t kFnvPrime = 0x100000001b3;
        uint64_t digest = kFnvOffset;
        for (const Piece& piece : cut.pieces) {
            digest = (digest ^ static_cast<uint32_t>(piece.request)) * kFnvPrime;
            digest = (digest ^ static_cast<uint32_t>(piece.end_tile)) * kFnvPrime;
        }
        if (std::find(seen_.begin(), seen_.end(), digest) != seen_.end()) return false;
        seen_.push_back(digest);
        return true;
    }

    const Problem& problem_;
    const CostModel& cost_;
    std::optional<Candidate> best_;
    std::vector<uint64_t> seen_;
    int num_cuts_ = 0;
    int64_t spent_ = 0;
};

Candidate plan_fixed(const Problem& problem, const CostModel& cost, int split_tiles) {
    require(
        split_tiles >= 1,
        "split_tiles: the policy 'fixed' expects at least 1, got " + std::to_string(split_tiles));
    int64_t pieces = 0;
    for (int request = 0; request < problem.num_requests(); ++request) {
        pieces += ceil_div(problem.num_tiles(request), split_tiles);
    }
    require(pieces * problem.row_groups() <= kMaxInstructions,
            "split_tiles: " + std::to_string(split_tiles) + " would need more than " +
                std::to_string(kMaxInstructions) + " instructions");
    return evaluate(problem, cost, cut_fixed(problem, split_tiles), {});
}

Candidate choose(const Problem& problem, const CostModel& cost, Policy policy, int split_tiles) {
    switch (policy) {
        case Policy::kBackward: {
            const SliceOptions unsliced{true, 0};
            return evaluate(problem, cost, cut_backward(problem, cost), unsliced);
        }
        case Policy::kUnsplit:
            return evaluate(problem, cost, cut_unsplit(problem), {});
        case Policy::kFixed:
            return plan_fixed(problem, cost, split_tiles);
        case Policy::kBalanced:
            break;
    }
    return Search(problem, cost).run();
}

}  // namespace

Policy parse_policy(const std::string& name) {
    if (name == "balanced") return Policy::kBalanced;
    if (name == "backward") return Policy::kBackward;
    if (name == "unsplit") return Policy::kUnsplit;
    if (name == "fixed") return Policy::kFixed;
    throw std::invalid_argument(
        "policy: expected 'balanced', 'backward', 'unsplit' or 'fixed', got '" + name + "'");
}

Plan plan(const Problem& problem, const CostModel& cost, Policy policy, int split_tiles) {
    check_problem(problem);
    check_cost_model(cost);

    Plan result;
    result.num_workers = problem.num_workers;
    if (problem.num_requests() == 0) return result;

    const Candidate chosen = choose(problem, cost, policy, split_tiles);
    const std::vector<int32_t>& order = chosen.order;
    const Timeline& timeline = chosen.timeline;
    result.num_slots = serialise(chosen.graph, order, result.words);
    result.predicted_us = timeline.makespan_us;
    for (const int32_t task : order) {
        result.worker.push_back(timeline.worker[task]);
        result.start_us.push_back(timeline.start_us[task]);
        result.end_us.push_back(timeline.end_us[task]);
    }
    return result;
}

}  // namespace mla
