#include "scheduler/merge_tree.h"

#include <numeric>

#include "scheduler/problem.h"

namespace mla {

void build_merge_tree(int num_leaves, TreeShape shape, MergeTree& tree) {
    tree.num_leaves = num_leaves;
    tree.children.clear();
    tree.node_begin.assign(1, 0);

    const auto close_node = [&tree] {
        tree.node_begin.push_back(static_cast<int32_t>(tree.children.size()));
    };

    std::vector<int32_t> level(num_leaves);
    std::iota(level.begin(), level.end(), 0);
    while (level.size() > kMaxReductionInputs) {
        const int width = static_cast<int>(level.size());
        const int merged = shape == TreeShape::kStaggered ? num_early_leaves(width) : width;
        // With fewer than the whole level merged, the rest must fit beside the groups.
        const int groups = merged < width ? kMaxReductionInputs - (width - merged)
                                          : ceil_div(width, kMaxReductionInputs);
        std::vector<int32_t> next;
        for (int group = 0; group < groups; ++group) {
            const int begin = static_cast<int>(int64_t{merged} * group / groups);
            const int end = static_cast<int>(int64_t{merged} * (group + 1) / groups);
            next.push_back(num_leaves + tree.num_nodes());
            tree.children.insert(tree.children.end(), level.begin() + begin, level.begin() + end);
            close_node();
        }
        next.insert(next.end(), level.begin() + merged, level.end());
        level = std::move(next);
    }
    tree.children.insert(tree.children.end(), level.begin(), level.end());
    close_node();
}

}  // namespace mla
