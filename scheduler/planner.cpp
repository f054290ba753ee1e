#include "scheduler/planner.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>

#include "scheduler/backward.h"
#include "scheduler/cut.h"
#include "scheduler/lower.h"
#include "scheduler/problem.h"
#include "scheduler/queue_order.h"
#include "scheduler/serialiser.h"
#include "scheduler/simulate.h"

namespace mla {

namespace {

constexpr int64_t kMaxInstructions = 1 << 20;

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

// Before a Problem is made, whose memory is in proportion to its fills.
void check_size(const Batch& batch) {
    int64_t instructions = 0;
    for (int sequence = 0; sequence < batch.num_sequences(); ++sequence) {
        instructions += batch.row_groups(sequence);
    }
    for (const TokenRange& range : tokens_to_fill(batch)) {
        instructions += ceil_div(range.end - range.begin, tokens_per_fill(batch.num_heads));
    }
    require(instructions <= kMaxInstructions,
            "seq_lens: " + std::to_string(batch.num_sequences()) + " sequences and " +
                std::to_string(batch.total_tokens) + " tokens need more than " +
                std::to_string(kMaxInstructions) + " instructions");
}

// A cut, and what does not depend on the slices of its reductions.
struct Draft {
    Draft(const Problem& problem, const CostModel& cost, Cut whole_cut)
        : cut(std::move(whole_cut)),
          leaves(lower_leaves(problem, cut)),
          order(leaf_order(problem, cut)),
          num_workers(problem.num_workers) {
        num_noops = spread_workers(problem, leaves, order);
        simulation.emplace(leaves, order, num_workers, cost);
    }

    Cut cut;
    TaskGraph leaves;
    std::vector<int32_t> order;
    std::optional<LeafSimulation> simulation;
    int num_workers;
    int num_noops = 0;  // that begin the queue
};

// A plan that is not serialised yet.
struct Candidate {
    std::shared_ptr<const Draft> draft;
    TaskGraph graph{};
    std::vector<int32_t> order{};
    Timeline timeline{};
};

// On `num_workers` as on those of the draft. A search in clusters refines the plans of the one
// before, for workers of its own.
bool leaves_run_alike(const Draft& draft, int num_workers) {
    return num_workers == draft.num_workers ||
           num_instructions(draft.leaves) <=
               static_cast<size_t>(std::min(num_workers, draft.num_workers));
}

// Of the candidate's draft, with reductions. False, and unfinished, if the plan cannot end before
// `give_up_us`.
bool complete(const Problem& problem,
              const CostModel& cost,
              const SliceOptions& slices,
              double give_up_us,
              Candidate& candidate) {
    const Draft& draft = *candidate.draft;
    const Timeline& leaf_timeline = draft.simulation->timeline();
    if (leaf_timeline.makespan_us >= give_up_us) return false;
    candidate.graph = draft.leaves;
    lower_reductions(problem, cost, draft.cut, slices, candidate.graph);
    if (candidate.graph.merges.empty()) {
        candidate.order = draft.order;
        candidate.timeline = leaf_timeline;
        return true;
    }
    const auto num_leaves = static_cast<int>(draft.order.size());
    const Forecast times = forecast(candidate.graph, num_leaves, leaf_timeline, cost);
    if (times.finish_us >= give_up_us) return false;
    candidate.order = append_reductions(draft.order, candidate.graph, times);
    candidate.timeline =
        leaves_run_alike(draft, problem.num_workers)
            ? draft.simulation->with_reductions(
                  candidate.graph, candidate.order, problem.num_workers)
            : simulate(candidate.graph, candidate.order, problem.num_workers, cost);
    return true;
}

Candidate evaluate(const Problem& problem,
                   const CostModel& cost,
                   Cut cut,
                   const SliceOptions& slices) {
    Candidate candidate{std::make_shared<const Draft>(problem, cost, std::move(cut))};
    complete(problem, cost, slices, std::numeric_limits<double>::infinity(), candidate);
    return candidate;
}

// Tries cuts until its budget of simulated instructions is spent; keeps the best.
class Search {
  public:
    Search(const Problem& problem, const CostModel& cost) : problem_(problem), cost_(cost) {}

    Candidate run() {
        const int gangs = problem_.num_gangs();
        const int64_t unsplit = problem_.gangs_unsplit();
        consider(cut_unsplit(problem_));
        // Costs so large that no plan ends in a finite time.
        if (!best_) return evaluate(problem_, cost_, cut_unsplit(problem_), {});

        // Gangs that run several pieces one after the other. Where sequences are few, one piece
        // per gang comes first.
        const bool many = 2 * unsplit >= gangs;
        if (many) {
            if (!problem_.uniform) consider_short_pieces(unsplit, gangs);
            consider_lines();
            // More pieces than gangs, taken as gangs come free.
            if (unsplit < 2 * gangs) consider_even(2 * gangs);
        }
        // One wave: every piece on a gang of its own. Fewer pieces than gangs cost no
        // time where the memory is the limit, and are fewer to merge.
        int best_count = 0;
        for (const double share : {1.0, 0.85, 0.75, 0.65, 0.5}) {
            const int count = static_cast<int>(gangs * share);
            if (count <= unsplit) break;
            if (consider_even(count)) best_count = count;
        }
        consider_one_length(gangs);
        for (const double step : {0.05, 0.025, 0.0125}) {
            const int centre = best_count;
            for (const double factor : {1.0 - step, 1.0 + step}) {
                const int count = std::min(gangs, static_cast<int>(centre * factor + 0.5));
                if (count > unsplit && consider_even(count)) best_count = count;
            }
        }
        refine_slices();
        if (!many) {
            spent_ = 0;  // lines have a budget of their own
            consider_lines();
            refine_slices();
        }
        return std::move(*best_);
    }

    // Where nearly every worker has a sequence of its own there is little to share.
    static bool has_room(const Problem& problem, int workers) {
        return 4 * problem.workers_unsplit() <= 3 * workers;
    }

    // Partials shared by mates, if they are better than `other`.
    Candidate run_clusters(int cluster_ctas, Candidate other) {
        best_ = std::move(other);
        for (const double share : {1.0, 0.85, 0.7, 0.5}) {
            const int workers = static_cast<int>(problem_.num_workers * share);
            if (!has_room(problem_, workers)) break;
            for (const bool in_one : {true, false}) {
                consider(cut_into_clusters(problem_, cost_, cluster_ctas, in_one, workers));
            }
        }
        second_.reset();
        if (best_->draft->cut.num_mates() > 1) refine_slices();
        return std::move(*best_);
    }

  private:
    // Simulated instructions, for the cuts and then for their slices. Keeps the planning of 128
    // sequences under a millisecond; fewer may take two.
    static constexpr int64_t kCutBudget = 3700;
    static constexpr int64_t kSliceBudget = 4100;
    // Even a huge batch gets these: whole sequences, and the first two lines.
    static constexpr int kMinCuts = 3;
    // A plan with more instructions has to win by this much for each.
    static constexpr double kInstructionPenaltyUs = 0.001;

    static double score_us(const Candidate& candidate) {
        return candidate.timeline.makespan_us +
               kInstructionPenaltyUs *
                   static_cast<double>(candidate.graph.tasks.size() - candidate.draft->num_noops);
    }

    bool out_of_budget(int64_t budget) const { return num_cuts_ >= kMinCuts && spent_ >= budget; }

    // True if it is the best so far.
    bool consider(Cut cut) {
        if (cut.pieces.empty() || out_of_budget(kCutBudget) || !is_new(cut)) return false;
        ++num_cuts_;
        const auto draft = std::make_shared<const Draft>(problem_, cost_, std::move(cut));
        spent_ += static_cast<int64_t>(draft->leaves.tasks.size());
        const bool better = keep_if_better({}, draft);
        return keep_if_better({SliceRule::kFittedFinely, 0}, draft) || better;
    }

    bool consider_even(int max_gangs) {
        if (out_of_budget(kCutBudget)) return false;
        return consider(cut_even(problem_, cost_, max_gangs));
    }

    void consider_lines() {
        for (const int min_tiles : {4, 1}) {
            for (const LineOrder line_order : {LineOrder::kLongestFirst, LineOrder::kGiven}) {
                consider(cut_line(problem_, cost_, min_tiles, line_order));
            }
        }
    }

    // More pieces than workers, the longest first: only what is longer than the others is
    // cut, so that the short ones fill the gaps.
    void consider_short_pieces(int64_t unsplit, int workers) {
        for (const double waves : {0.5, 1.0, 2.0}) {
            const int tiles = shortest_length(unsplit + static_cast<int64_t>(workers * waves));
            if (!out_of_budget(kCutBudget)) consider(cut_fixed(problem_, tiles));
        }
    }

    // One wave again, but every piece as long as any other: the shortest length that fits, and
    // somewhat longer ones.
    void consider_one_length(int max_gangs) {
        if (problem_.gangs_unsplit() > max_gangs) return;
        const int longest = problem_.longest();
        const int shortest = shortest_length(max_gangs);
        int previous = 0;
        for (const double factor : {1.0, 1.12, 1.25}) {
            const int tiles = std::max(previous + 1, static_cast<int>(shortest * factor + 0.5));
            if (tiles >= longest || out_of_budget(kCutBudget)) return;
            consider(cut_fixed(problem_, tiles));
            previous = tiles;
        }
    }

    // Of all pieces, in tiles, that keeps at most `max_gangs` gangs busy.
    int shortest_length(int64_t max_gangs) const {
        int shortest = 1;
        for (int too_long = problem_.longest(); shortest < too_long;) {
            const int middle = shortest + (too_long - shortest) / 2;
            if (num_gangs_for(middle) <= max_gangs) {
                too_long = middle;
            } else {
                shortest = middle + 1;
            }
        }
        return shortest;
    }

    int64_t num_gangs_for(int tiles_per_piece) const {
        int64_t gangs = 0;
        for (int sequence = 0; sequence < problem_.num_sequences(); ++sequence) {
            gangs += int64_t{ceil_div(problem_.num_tiles(sequence), tiles_per_piece)} *
                     problem_.gangs_per_piece(sequence);
        }
        return gangs;
    }

    bool keep_if_better(const SliceOptions& slices, const std::shared_ptr<const Draft>& draft) {
        const double best_us = best_ ? score_us(*best_) : std::numeric_limits<double>::infinity();
        trial_.draft = draft;
        if (!complete(problem_, cost_, slices, best_us, trial_)) return false;
        spent_ += static_cast<int64_t>(trial_.graph.tasks.size());
        if (score_us(trial_) >= best_us) return false;
        if (best_) {
            second_ = best_->draft;
        } else {
            best_.emplace();
        }
        std::swap(*best_, trial_);
        return true;
    }

    // Of the best cut and of the one that was the best before: which is better with slices of its
    // own is not yet known.
    void refine_slices() {
        const std::shared_ptr<const Draft> runner_up = std::move(second_);
        refine_slices_of(best_->draft);
        if (runner_up) refine_slices_of(runner_up);
    }

    void refine_slices_of(std::shared_ptr<const Draft> draft) {
        if (draft->cut.merges_nothing()) return;
        for (const int direction : {1, -1}) {
            int failures = 0;
            for (int steps = direction; failures < 2 && !out_of_budget(kSliceBudget);
                 steps += direction) {
                failures = keep_if_better({SliceRule::kFitted, steps}, draft) ? 0 : failures + 1;
            }
        }
    }

    // Candidates often coincide; two with equal pieces are one.
    bool is_new(const Cut& cut) {
        constexpr uint64_t kFnvOffset = 0xcbf29ce484222325;
        constexpr uint64_t kFnvPrime = 0x100000001b3;
        uint64_t digest = kFnvOffset;
        for (const Piece& piece : cut.pieces) {
            digest = (digest ^ static_cast<uint32_t>(piece.sequence)) * kFnvPrime;
            digest = (digest ^ static_cast<uint32_t>(piece.end_tile)) * kFnvPrime;
            digest = (digest ^ static_cast<uint32_t>(piece.num_mates)) * kFnvPrime;
        }
        if (std::find(seen_.begin(), seen_.end(), digest) != seen_.end()) return false;
        seen_.push_back(digest);
        return true;
    }

    const Problem& problem_;
    const CostModel& cost_;
    std::optional<Candidate> best_;
    Candidate trial_;                      // the latest one, kept for its memory
    std::shared_ptr<const Draft> second_;  // of the best before that
    std::vector<uint64_t> seen_;
    int num_cuts_ = 0;
    int64_t spent_ = 0;
};

Candidate plan_fixed(const Problem& problem,
                     const CostModel& cost,
                     int split_tiles,
                     const SliceOptions& slices) {
    require(split_tiles >= 1,
            "split_tiles: the policies that need it expect at least 1, got " +
                std::to_string(split_tiles));
    int64_t partials = 0;
    for (int sequence = 0; sequence < problem.num_sequences(); ++sequence) {
        const int pieces = ceil_div(problem.num_tiles(sequence), split_tiles);
        require(pieces <= kMaxRunInputs,
                "split_tiles: " + std::to_string(split_tiles) + " would cut a sequence into " +
                    std::to_string(pieces) + " pieces, a reduction reads at most " +
                    std::to_string(kMaxRunInputs));
        partials += int64_t{pieces} * problem.row_groups(sequence);
    }
    require(partials <= kMaxInstructions,
            "split_tiles: " + std::to_string(split_tiles) + " would need more than " +
                std::to_string(kMaxInstructions) + " instructions");
    return evaluate(problem, cost, cut_fixed(problem, split_tiles), slices);
}

// Clusters may have fewer workers than there are.
Candidate search(const Batch& batch,
                 const Problem& problem,
                 const CostModel& cost,
                 const std::vector<Clusters>& clusters) {
    Candidate best = Search(problem, cost).run();
    for (const Clusters& each : clusters) {
        const int workers = std::min(each.count, problem.num_workers / each.ctas) * each.ctas;
        if (!Search::has_room(problem, workers)) continue;
        Problem clustered = make_problem(batch, workers);
        clustered.leaves_sms_out = workers < problem.num_workers;
        best = Search(clustered, cost).run_clusters(each.ctas, std::move(best));
    }
    return best;
}

Candidate choose(const Batch& batch,
                 const Problem& problem,
                 const CostModel& cost,
                 Policy policy,
                 int split_tiles,
                 const std::vector<Clusters>& clusters) {
    switch (policy) {
        case Policy::kBackward:
            return evaluate(problem, cost, cut_backward(problem, cost), {SliceRule::kWhole, 0});
        case Policy::kUnsplit:
            break;
        case Policy::kFixed:
            return plan_fixed(problem, cost, split_tiles, {});
        case Policy::kBatchInvariant:
            return plan_fixed(problem,
                              cost,
                              split_tiles == 0 ? kInvariantTiles : split_tiles,
                              {SliceRule::kBatchInvariant, 0});
        case Policy::kBalanced:
            if (!problem.sequences.empty()) return search(batch, problem, cost, clusters);
    }
    return evaluate(problem, cost, cut_unsplit(problem), {});
}

}  // namespace

Policy parse_policy(const std::string& name) {
    std::string names;
    for (const PolicyName& known : kPolicyNames) {
        if (name == known.name) return known.policy;
        names += std::string("'") + known.name + "', ";
    }
    throw std::invalid_argument("policy: expected " + names + "got '" + name + "'");
}

Plan plan(const Batch& batch,
          int num_workers,
          const CostModel& cost,
          Policy policy,
          int split_tiles,
          const std::vector<Clusters>& clusters) {
    check_batch(batch);
    check_range("num_workers", num_workers, 1, kMaxWorkers);
    check_cost_model(cost);
    check_size(batch);

    for (const Clusters& each : clusters) {
        const bool is_power = each.ctas > 0 && (each.ctas & (each.ctas - 1)) == 0;
        require(is_power && 2 <= each.ctas && each.ctas <= kMaxMates,
                "clusters: expected 2, 4 or 8 workers each, got " + std::to_string(each.ctas));
        check_range("clusters", each.count, 0, kMaxWorkers);
    }

    Plan result;
    const Problem problem = make_problem(batch, num_workers);
    const Candidate chosen = choose(batch, problem, cost, policy, split_tiles, clusters);
    result.num_workers = chosen.draft->num_workers;
    const std::vector<int32_t>& order = chosen.order;
    const Timeline& timeline = chosen.timeline;
    result.num_slots = serialise(chosen.graph, order, batch.num_heads, result.words);
    result.predicted_us = timeline.makespan_us;
    for (const int32_t task : order) {
        for (int mate = 0; mate < chosen.graph.tasks[task].num_mates; ++mate) {
            result.worker.push_back(timeline.worker[task] + mate);
            result.start_us.push_back(timeline.start_us[task]);
            result.end_us.push_back(timeline.end_us[task]);
        }
    }
    return result;
}

}  // namespace mla
