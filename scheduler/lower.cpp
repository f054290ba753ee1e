#include "scheduler/lower.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "scheduler/task_cost.h"

namespace mla {

namespace {

constexpr int kColumnChunks = kLatentDim / kColumnChunk;

struct SliceSize {
    int num_rows;
    int num_cols;
};

// Slices in the order of their number: fewer and fewer rows, then single rows in fewer and
// fewer columns. False when there is none so fine.
bool slice_size(int log2_slices, int num_rows, SliceSize& size) {
    int rows = num_rows;
    int chunks = kColumnChunks;
    for (int i = 0; i < log2_slices; ++i) {
        if (rows > 1) {
            rows = ceil_div(rows, 2);
        } else if (chunks > 1) {
            chunks /= 2;
        } else {
            return false;
        }
    }
    size = {rows, chunks * kColumnChunk};
    return true;
}

int num_slices(const SliceSize& size, int num_rows) {
    return ceil_div(num_rows, size.num_rows) * (kLatentDim / size.num_cols);
}

// Finer steps on the same way: 1, 2, 3, 4, 6, 8, 12, ... slices of rows, then of single rows. The
// odd steps, and those of single rows, are the ones above.
std::vector<SliceSize> fine_slice_sizes(int num_rows) {
    std::vector<SliceSize> sizes;
    sizes.reserve(16);  // those of 64 rows
    for (int slices = 1; slices < num_rows;) {
        sizes.push_back({ceil_div(num_rows, slices), kLatentDim});
        const bool is_power = (slices & (slices - 1)) == 0;
        slices = slices == 1 ? 2 : is_power ? slices / 2 * 3 : slices / 3 * 4;
    }
    for (int chunks = kColumnChunks; chunks >= 1; chunks /= 2) {
        sizes.push_back({1, chunks * kColumnChunk});
    }
    return sizes;
}

SliceSize invariant_slices(int num_inputs, int num_rows) {
    SliceSize size{num_rows, kLatentDim};
    SliceSize finer{};
    for (int log2_slices = 1; slice_size(log2_slices, num_rows, finer); ++log2_slices) {
        if (num_slices(finer, num_rows) > num_inputs) break;
        size = finer;
    }
    return size;
}

class ReductionLowering {
  public:
    ReductionLowering(const Problem& problem,
                      const CostModel& cost,
                      const Cut& cut,
                      const SliceOptions& options,
                      TaskGraph& graph)
        : problem_(problem), cost_(cost), cut_(cut), options_(options), graph_(graph) {}

    void run() {
        for (int sequence = 0; sequence < problem_.num_sequences(); ++sequence) {
            if (!is_split(sequence)) continue;
            rows_to_merge_ +=
                int64_t{cut_.num_results(sequence)} * problem_.sequences[sequence].num_rows;
        }
        int32_t first_partial = 0;
        for (int sequence = 0; sequence < problem_.num_sequences(); ++sequence) {
            if (is_split(sequence)) add_sequence(sequence, first_partial);
            first_partial += cut_.num_pieces(sequence) * problem_.row_groups(sequence);
        }
    }

  private:
    bool is_split(int sequence) const { return cut_.num_results(sequence) > 1; }

    void add_sequence(int sequence, int32_t first_partial) {
        const int row_groups = problem_.row_groups(sequence);
        Task task;
        task.opcode = Opcode::kMlaReduction;
        task.sequence = problem_.sequences[sequence].id;
        for (int group = 0; group < row_groups; ++group) {
            task.row_begin = group * problem_.group_rows;
            task.num_rows = problem_.rows_from(sequence, task.row_begin);
            if (!cut_.trees.empty()) {
                add_tree(cut_.trees[sequence], first_partial + group, row_groups, task);
                continue;
            }
            task.to_output = true;
            add_merge({first_partial + group, cut_.num_results(sequence), row_groups}, task);
        }
    }

    // The partials of the tree's leaves are first_partial, first_partial + step, ...
    void add_tree(const MergeTree& tree, int32_t first_partial, int step, Task task) {
        const auto first_node = static_cast<int32_t>(graph_.tasks.size());
        for (int node = 0; node < tree.num_nodes(); ++node) {
            const auto first_input = static_cast<int32_t>(graph_.inputs.size());
            for (int i = tree.node_begin[node]; i < tree.node_begin[node + 1]; ++i) {
                const int32_t child = tree.children[i];
                graph_.inputs.push_back(child < tree.num_leaves
                                            ? first_partial + child * step
                                            : first_node + child - tree.num_leaves);
            }
            task.to_output = node + 1 == tree.num_nodes();
            add_merge({first_input, tree.num_children(node), 0}, task);
        }
    }

    // `whole` says which rows, and where they go.
    void add_merge(const Merge& merge, const Task& whole) {
        const SliceSize size = slices_of(merge.num_inputs, whole.num_rows);
        Task task = whole;
        task.merge = static_cast<int32_t>(graph_.merges.size());
        task.num_cols = size.num_cols;
        for (int row = 0; row < whole.num_rows; row += size.num_rows) {
            task.row_begin = whole.row_begin + row;
            task.num_rows = std::min(size.num_rows, whole.num_rows - row);
            for (task.col_begin = 0; task.col_begin < kLatentDim; task.col_begin += size.num_cols) {
                graph_.tasks.push_back(task);
            }
        }
        graph_.merges.push_back(merge);
    }

    // Sequences are often alike.
    SliceSize slices_of(int num_inputs, int num_rows) {
        const auto [known, is_new] = sizes_.try_emplace({num_inputs, num_rows});
        if (is_new) known->second = choose_slices(num_inputs, num_rows);
        return known->second;
    }

    SliceSize choose_slices(int num_inputs, int num_rows) const {
        switch (options_.rule) {
            case SliceRule::kWhole:
                return {num_rows, kLatentDim};
            case SliceRule::kBatchInvariant:
                return invariant_slices(num_inputs, num_rows);
            case SliceRule::kFitted:
            case SliceRule::kFittedFinely:
                break;
        }
        return fitted_slices(num_inputs, num_rows);
    }

    // The size that lets this merge, and as many like it as equal all there is to merge, end
    // earliest when all are wanted at the same time.
    SliceSize fitted_slices(int num_inputs, int num_rows) const {
        const double merges_like_this =
            static_cast<double>(rows_to_merge_) / (int64_t{num_inputs} * num_rows);
        SliceSize best{num_rows, kLatentDim};
        double best_us = 0.0;
        int best_step = 0;
        const std::vector<SliceSize> fine_sizes = fine_slice_sizes(num_rows);
        const int num_steps = static_cast<int>(fine_sizes.size());
        for (int step = 0; step < num_steps; ++step) {
            const SliceSize& size = fine_sizes[step];
            const bool is_fine = step > 0 && step % 2 == 0 && size.num_rows > 1;
            if (is_fine && options_.rule != SliceRule::kFittedFinely) continue;
            const double rounds =
                std::ceil(merges_like_this * num_slices(size, num_rows) / problem_.num_workers);
            const double us =
                slice_us(num_inputs, size, false) + (rounds - 1) * slice_us(num_inputs, size, true);
            if (step == 0 || us < best_us) {
                best = size;
                best_us = us;
                best_step = step;
            }
        }
        // A scale that leaves the range changes nothing.
        const int step = std::max(0, best_step + options_.steps);
        return step < num_steps ? fine_sizes[step] : best;
    }

    double slice_us(int num_inputs, const SliceSize& size, bool follows) const {
        return reduction_us(num_inputs, size.num_rows, size.num_cols, follows, cost_);
    }

    const Problem& problem_;
    const CostModel& cost_;
    const Cut& cut_;
    const SliceOptions options_;
    TaskGraph& graph_;
    int64_t rows_to_merge_ = 0;                       // of all pieces
    std::map<std::pair<int, int>, SliceSize> sizes_;  // by inputs and rows
};

}  // namespace

TaskGraph lower_leaves(const Problem& problem, const Cut& cut) {
    TaskGraph graph;
    size_t num_leaves = problem.fills.size();
    for (const Piece& piece : cut.pieces) num_leaves += problem.row_groups(piece.sequence);
    graph.tasks.reserve(num_leaves);
    for (const Piece& piece : cut.pieces) {
        const Sequence& sequence = problem.sequences[piece.sequence];
        const bool adopts = piece.begin_tile == 0 && cut.adopts(piece.sequence);
        // All pieces of a sequence have as many tasks.
        const int tasks_to_last = (cut.num_pieces(piece.sequence) - 1) * sequence.row_groups;
        Task task;
        task.opcode = Opcode::kMlaPartial;
        task.sequence = sequence.id;
        task.to_output = !piece.is_adopted && cut.num_results(piece.sequence) == 1;
        task.length = sequence.length;
        task.kv_sharing = sequence.row_groups;
        task.num_mates = piece.num_mates;
        task.start = piece.begin_tile * kKvTile;
        // The last tile need not be full.
        task.end =
            static_cast<int32_t>(std::min<int64_t>(int64_t{piece.end_tile} * kKvTile, task.length));
        for (int row = 0; row < sequence.num_rows; row += problem.group_rows) {
            task.row_begin = row;
            task.num_rows = problem.rows_from(piece.sequence, row);
            if (adopts) task.adopted = static_cast<int32_t>(graph.tasks.size()) + tasks_to_last;
            graph.tasks.push_back(task);
        }
    }
    for (const TokenRange& range : problem.fills) {
        Task task;
        task.opcode = Opcode::kMlaFill;
        task.to_output = true;
        task.token_begin = range.begin;
        task.token_end = range.end;
        task.num_rows = (range.end - range.begin) * problem.num_heads;
        graph.tasks.push_back(task);
    }
    return graph;
}

std::vector<int32_t> leaf_order(const Problem& problem, const Cut& cut) {
    std::vector<int32_t> first_partial;  // of each piece
    first_partial.reserve(cut.pieces.size());
    int32_t num_partials = 0;
    for (const Piece& piece : cut.pieces) {
        first_partial.push_back(num_partials);
        num_partials += problem.row_groups(piece.sequence);
    }
    std::vector<int32_t> order;
    order.reserve(num_partials + problem.fills.size());
    for (const int32_t piece : cut.start_order) {
        const int row_groups = problem.row_groups(cut.pieces[piece].sequence);
        for (int group = 0; group < row_groups; ++group) {
            order.push_back(first_partial[piece] + group);
        }
    }
    for (size_t fill = 0; fill < problem.fills.size(); ++fill) {
        order.push_back(num_partials + static_cast<int32_t>(fill));
    }
    return order;
}

void lower_reductions(const Problem& problem,
                      const CostModel& cost,
                      const Cut& cut,
                      const SliceOptions& slices,
                      TaskGraph& graph) {
    ReductionLowering(problem, cost, cut, slices, graph).run();
}

}  // namespace mla
