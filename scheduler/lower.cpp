#include "scheduler/lower.h"

#include <algorithm>

#include "scheduler/task_cost.h"

namespace mla {

namespace {

constexpr int kColumnChunks = kLatentDim / kColumnChunk;

// Heads [begin, begin + count) of one token that lie in one row group.
struct HeadRange {
    int32_t token;
    int32_t row_group;
    int32_t head_begin;
    int32_t num_heads;
};

std::vector<HeadRange> head_ranges(const Problem& problem) {
    std::vector<HeadRange> ranges;
    for (int token = 0; token < problem.new_tokens; ++token) {
        int row = token * problem.num_heads;
        const int token_end = row + problem.num_heads;
        while (row < token_end) {
            const int group = row / kMaxRows;
            const int end = std::min(token_end, (group + 1) * kMaxRows);
            ranges.push_back({token, group, row - token * problem.num_heads, end - row});
            row = end;
        }
    }
    return ranges;
}

struct SliceSize {
    int num_heads;
    int num_cols;
};

// Slices in the order of their number: fewer and fewer heads, then single heads in
// fewer and fewer columns. False when there is none so fine.
bool slice_size(int log2_slices, int num_heads, SliceSize& size) {
    int heads = num_heads;
    int chunks = kColumnChunks;
    for (int i = 0; i < log2_slices; ++i) {
        if (heads > 1) {
            heads = ceil_div(heads, 2);
        } else if (chunks > 1) {
            chunks /= 2;
        } else {
            return false;
        }
    }
    size = {heads, chunks * kColumnChunk};
    return true;
}

int num_slices(const SliceSize& size, int num_heads) {
    return ceil_div(num_heads, size.num_heads) * (kLatentDim / size.num_cols);
}

// Every fine slice lies in one coarse slice.
bool nests(const SliceSize& fine, const SliceSize& coarse) {
    return coarse.num_heads % fine.num_heads == 0 && coarse.num_cols % fine.num_cols == 0;
}

class ReductionLowering {
  public:
    ReductionLowering(const Problem& problem,
                      const CostModel& cost,
                      const Cut& cut,
                      const SliceOptions& options,
                      TaskGraph& graph)
        : problem_(problem),
          cost_(cost),
          cut_(cut),
          options_(options),
          ranges_(head_ranges(problem)),
          graph_(graph) {}

    void run() {
        for (int request = 0; request < problem_.num_requests(); ++request) {
            if (is_split(request)) num_split_pieces_ += cut_.num_pieces(request);
        }
        for (int request = 0; request < problem_.num_requests(); ++request) {
            if (is_split(request)) add_request(request);
        }
    }

  private:
    // What the nodes of a tree, for one head range, are cut into. The root may be cut
    // finer than the others, because there are fewer roots to share the workers.
    struct TreeSlices {
        SliceSize inner;
        SliceSize root;
    };

    bool is_split(int request) const { return cut_.num_pieces(request) > 1; }

    void add_request(int request) {
        const int pieces = cut_.num_pieces(request);
        if (cut_.trees.empty() && tree_.num_leaves != pieces) {
            build_merge_tree(pieces, cut_.shape, tree_);
        }
        const MergeTree& tree = cut_.trees.empty() ? tree_ : cut_.trees[request];
        for (const HeadRange& range : ranges_) {
            add_tree(request, range, tree, slices_of(tree, range.num_heads));
        }
    }

    void add_tree(int request,
                  const HeadRange& range,
                  const MergeTree& tree,
                  const TreeSlices& slices) {
        first_task_.clear();
        for (int node = 0; node < tree.num_nodes(); ++node) {
            const bool is_root = node + 1 == tree.num_nodes();
            const SliceSize& size = is_root ? slices.root : slices.inner;
            first_task_.push_back(static_cast<int32_t>(graph_.tasks.size()));
            for (int head = 0; head < range.num_heads; head += size.num_heads) {
                for (int col = 0; col < kLatentDim; col += size.num_cols) {
                    Task task;
                    task.opcode = Opcode::kMlaReduction;
                    task.to_output = is_root;
                    task.request = request;
                    task.token = range.token;
                    task.head_begin = range.head_begin + head;
                    task.num_heads = std::min(size.num_heads, range.num_heads - head);
                    task.col_begin = col;
                    task.num_cols = size.num_cols;
                    task.input_begin = static_cast<int32_t>(graph_.inputs.size());
                    task.num_inputs = tree.num_children(node);
                    // The slice of an inner node that holds this one.
                    const int inner_slice =
                        head / slices.inner.num_heads * (kLatentDim / slices.inner.num_cols) +
                        col / slices.inner.num_cols;
                    add_inputs(request, range.row_group, tree, node, inner_slice);
                    graph_.tasks.push_back(task);
                }
            }
        }
    }

    void add_inputs(int request, int row_group, const MergeTree& tree, int node, int inner_slice) {
        const int first_piece = cut_.first_piece[request];
        for (int i = tree.node_begin[node]; i < tree.node_begin[node + 1]; ++i) {
            const int32_t child = tree.children[i];
            graph_.inputs.push_back(child < tree.num_leaves
                                        ? (first_piece + child) * problem_.row_groups() + row_group
                                        : first_task_[child - tree.num_leaves] + inner_slice);
        }
    }

    TreeSlices slices_of(const MergeTree& tree, int num_heads) {
        if (tree.num_leaves == last_num_leaves_ && num_heads == last_num_heads_)
            return last_slices_;
        last_num_leaves_ = tree.num_leaves;
        last_num_heads_ = num_heads;
        const int num_inner = tree.num_nodes() - 1;
        const int num_root_inputs = tree.num_children(num_inner);
        TreeSlices slices;
        slices.root = choose_slices(1, num_root_inputs, tree.num_leaves, num_heads);
        slices.inner = slices.root;
        if (num_inner > 0) {
            slices.inner =
                choose_slices(num_inner, tree.num_children(0), tree.num_leaves, num_heads);
            if (!nests(slices.root, slices.inner)) slices.root = slices.inner;
        }
        last_slices_ = slices;
        return slices;
    }

    // The size that lets `num_nodes` merges of this range, and as many of every other,
    // end earliest when all are wanted at the same time.
    SliceSize choose_slices(int num_nodes, int num_inputs, int num_leaves, int num_heads) const {
        SliceSize best{num_heads, kLatentDim};
        if (options_.whole) return best;

        // A request may use a share of the workers, in proportion to what it has to merge.
        const int64_t num_nodes_if_all_were_like_this =
            num_nodes * static_cast<int64_t>(ranges_.size()) * num_split_pieces_ / num_leaves;
        double best_us = 0.0;
        int best_log2 = 0;
        SliceSize size{};
        for (int log2_slices = 0; slice_size(log2_slices, num_heads, size); ++log2_slices) {
            Task task;
            task.num_inputs = num_inputs;
            task.num_heads = size.num_heads;
            task.num_cols = size.num_cols;
            const int64_t total = num_nodes_if_all_were_like_this * num_slices(size, num_heads);
            const auto rounds =
                static_cast<double>((total + problem_.num_workers - 1) / problem_.num_workers);
            const double us =
                reduction_us(task, false, cost_) + (rounds - 1) * reduction_us(task, true, cost_);
            if (log2_slices == 0 || us < best_us) {
                best = size;
                best_us = us;
                best_log2 = log2_slices;
            }
        }
        // A scale that leaves the range changes nothing.
        if (slice_size(std::max(0, best_log2 + options_.log2_scale), num_heads, size)) best = size;
        return best;
    }

    const Problem& problem_;
    const CostModel& cost_;
    const Cut& cut_;
    const SliceOptions options_;
    const std::vector<HeadRange> ranges_;
    TaskGraph& graph_;
    int64_t num_split_pieces_ = 0;
    std::vector<int32_t> first_task_;  // of each node of the tree in hand
    // Neighbouring requests are often alike.
    MergeTree tree_;
    int last_num_leaves_ = 0;
    int last_num_heads_ = 0;
    TreeSlices last_slices_{};
};

}  // namespace

TaskGraph lower_partials(const Problem& problem, const Cut& cut) {
    const int row_groups = problem.row_groups();
    TaskGraph graph;
    graph.kv_sharing = row_groups;
    graph.tasks.reserve(cut.pieces.size() * row_groups);
    for (const Piece& piece : cut.pieces) {
        Task task;
        task.opcode = Opcode::kMlaPartial;
        task.request = piece.request;
        task.to_output = cut.num_pieces(piece.request) == 1;
        task.length = problem.seq_lens[piece.request];
        task.start = piece.begin_tile * kKvTile;
        // The last tile need not be full.
        task.end =
            static_cast<int32_t>(std::min<int64_t>(int64_t{piece.end_tile} * kKvTile, task.length));
        for (int group = 0; group < row_groups; ++group) {
            task.row_begin = group * kMaxRows;
            task.num_rows = std::min(kMaxRows, problem.num_rows() - task.row_begin);
            graph.tasks.push_back(task);
        }
    }
    return graph;
}

std::vector<int32_t> partial_order(const Problem& problem, const Cut& cut) {
    const int row_groups = problem.row_groups();
    std::vector<int32_t> order;
    order.reserve(cut.pieces.size() * row_groups);
    for (const int32_t piece : cut.start_order) {
        for (int group = 0; group < row_groups; ++group) {
            order.push_back(piece * row_groups + group);
        }
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
