#include "scheduler/backward.h"

#include <algorithm>
#include <numeric>

#include "instructions/layout.h"
#include "scheduler/quality.h"

namespace mla {

namespace {

// Tiles that a sequence's row groups read, in units of a gang's work.
int64_t work_of(const Problem& problem, int sequence) {
    return int64_t{problem.num_tiles(sequence)} * problem.gangs_per_piece(sequence);
}

// Pieces that each sequence may have: one, and more for its share of the spare gangs.
std::vector<int> share_gangs(const Problem& problem) {
    std::vector<int> pieces(problem.num_sequences(), 1);
    int64_t total_work = 0;
    for (int sequence = 0; sequence < problem.num_sequences(); ++sequence) {
        total_work += work_of(problem, sequence);
    }
    const int64_t spare = problem.num_gangs() - problem.gangs_unsplit();
    if (spare <= 0) return pieces;

    // Cumulative rounding: the shares add up to `spare`.
    int64_t work_so_far = 0;
    int64_t given = 0;
    for (int sequence = 0; sequence < problem.num_sequences(); ++sequence) {
        work_so_far += work_of(problem, sequence);
        const int64_t due = spare * work_so_far / total_work;
        pieces[sequence] += static_cast<int>(due - given) / problem.gangs_per_piece(sequence);
        given = due;
        pieces[sequence] = std::min(pieces[sequence], problem.num_tiles(sequence));
    }
    return pieces;
}

class TreeGrower {
  public:
    TreeGrower(const Problem& problem, const CostModel& cost, int sequence, int num_gangs)
        : cost_(cost),
          sequence_(sequence),
          length_(problem.sequences[sequence].length),
          num_tiles_(problem.num_tiles(sequence)),
          num_gangs_(num_gangs),
          input_us_(whole_input_us(problem.rows_from(sequence, 0), cost)),
          tile_us_(cost.tile_us(problem.num_gangs() * problem.gang_size, problem.kv_sharing)) {}

    // Grows the tree; false if the sequence is better left in one piece.
    bool grow() {
        if (num_gangs_ == 1) return false;
        nodes_.push_back({-cost_.reduction_fixed_us, {}, 0});
        double best = current_quality();
        for (int node = latest_node(); node != kFull; node = latest_node()) {
            const std::vector<Node> before = nodes_;
            add_child(node);
            const double grown = current_quality();
            if (grown <= best && fits(before)) {
                nodes_ = before;
                break;
            }
            best = std::max(best, grown);
        }
        if (!fits(nodes_)) return false;
        const double unsplit_us = -cost_.partial_fixed_us - num_tiles_ * cost_.tile_us(1, 1);
        return best > unsplit_us;
    }

    // Hands the free inputs to partials. Appends the sequence's pieces to the cut and
    // their starts, counted from the finish, to start_us.
    MergeTree place(Cut& cut, std::vector<double>& start_us) {
        std::vector<int> reader;
        std::vector<double> due_us;
        for (int gang = 0; gang < num_gangs_; ++gang) {
            const int node = latest_node();
            reader.push_back(node);
            due_us.push_back(nodes_[node].next_us);
            take_input(node);
        }
        const double fixed_us = cost_.partial_fixed_us + cost_.dependency_us;
        std::vector<int> tiles;
        deal_tiles(due_us, num_tiles_, fixed_us, tile_us_, tiles);

        std::vector<std::vector<int32_t>> leaves(nodes_.size());
        int32_t num_leaves = 0;
        int32_t begin = 0;
        for (int gang = 0; gang < num_gangs_; ++gang) {
            if (tiles[gang] == 0) continue;
            leaves[reader[gang]].push_back(num_leaves++);
            cut.pieces.push_back({sequence_, begin, begin + tiles[gang]});
            start_us.push_back(due_us[gang] - fixed_us - tiles[gang] * tile_us_);
            begin += tiles[gang];
        }
        MergeTree tree;
        tree.num_leaves = num_leaves;
        tree.node_begin.push_back(0);
        emit(0, leaves, tree);
        return tree;
    }

  private:
    static constexpr int kFull = -1;

    struct Node {
        double next_us;             // when its next input is due, counted from the finish
        std::vector<int> children;  // reductions; partials come last
        int num_inputs;
    };

    double current_quality() const {
        std::vector<double> next_times;
        for (const Node& node : nodes_) {
            if (node.num_inputs < kMaxReductionInputs) next_times.push_back(node.next_us);
        }
        if (next_times.empty()) return kHopelessQuality;
        // A gang's workers are as many as the row groups that each node reduces.
        return quality(next_times, num_gangs_, /*num_tokens=*/1, length_, cost_, input_us_);
    }

    // Free inputs suffice for one partial per gang.
    bool fits(const std::vector<Node>& nodes) const {
        int64_t free_inputs = 0;
        for (const Node& node : nodes) free_inputs += kMaxReductionInputs - node.num_inputs;
        return free_inputs >= num_gangs_;
    }

    int latest_node() const {
        int latest = kFull;
        for (int node = 0; node < static_cast<int>(nodes_.size()); ++node) {
            if (nodes_[node].num_inputs == kMaxReductionInputs) continue;
            if (latest == kFull || nodes_[node].next_us > nodes_[latest].next_us) latest = node;
        }
        return latest;
    }

    void take_input(int node) {
        ++nodes_[node].num_inputs;
        nodes_[node].next_us -= input_us_;
    }

    void add_child(int parent) {
        const double due_us = nodes_[parent].next_us;
        take_input(parent);
        nodes_[parent].children.push_back(static_cast<int>(nodes_.size()));
        nodes_.push_back({due_us - cost_.dependency_us - cost_.reduction_fixed_us, {}, 0});
    }

    // Children before parents. A node left with a single input passes it on; returns the
    // leaf or node that stands for it, or -1.
    int32_t emit(int node, const std::vector<std::vector<int32_t>>& leaves, MergeTree& tree) {
        std::vector<int32_t> inputs = leaves[node];
        for (const int child : nodes_[node].children) {
            const int32_t input = emit(child, leaves, tree);
            if (input >= 0) inputs.push_back(input);
        }
        if (inputs.empty()) return -1;
        if (inputs.size() == 1) return inputs.front();
        tree.children.insert(tree.children.end(), inputs.begin(), inputs.end());
        tree.node_begin.push_back(static_cast<int32_t>(tree.children.size()));
        return tree.num_leaves + tree.num_nodes() - 1;
    }

    const CostModel& cost_;
    const int sequence_;
    const int length_;
    const int num_tiles_;
    const int num_gangs_;  // one for each piece
    const double input_us_;
    const double tile_us_;
    std::vector<Node> nodes_;  // the root first
};

}  // namespace

Cut cut_backward(const Problem& problem, const CostModel& cost) {
    const std::vector<int> max_pieces = share_gangs(problem);
    Cut cut;
    cut.first_piece.push_back(0);
    std::vector<double> start_us;  // of each piece, from its sequence's finish
    for (int sequence = 0; sequence < problem.num_sequences(); ++sequence) {
        const int tiles = problem.num_tiles(sequence);
        TreeGrower grower(problem, cost, sequence, max_pieces[sequence]);
        MergeTree tree;
        if (grower.grow()) {
            tree = grower.place(cut, start_us);
        } else {
            cut.pieces.push_back({sequence, 0, tiles});
            start_us.push_back(-cost.partial_fixed_us - tiles * cost.tile_us(1, 1));
        }
        cut.trees.push_back(std::move(tree));
        cut.first_piece.push_back(static_cast<int32_t>(cut.pieces.size()));
    }
    cut.start_order.resize(cut.pieces.size());
    std::iota(cut.start_order.begin(), cut.start_order.end(), 0);
    std::stable_sort(cut.start_order.begin(),
                     cut.start_order.end(),
                     [&start_us](int32_t a, int32_t b) { return start_us[a] < start_us[b]; });
    return cut;
}

}  // namespace mla
