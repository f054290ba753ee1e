// How the pieces of one request are merged when one reduction cannot read them all.
#pragma once

#include <cstdint>
#include <vector>

#include "instructions/layout.h"

namespace mla {

// Leaves are 0..num_leaves-1, in KV order; nodes number on from there, children before
// parents, the root last.
struct MergeTree {
    int32_t num_leaves = 0;
    std::vector<int32_t> children;    // of all nodes, one after the other
    std::vector<int32_t> node_begin;  // node i: children[node_begin[i], node_begin[i + 1])

    int num_nodes() const { return static_cast<int>(node_begin.size()) - 1; }
    int num_children(int node) const { return node_begin[node + 1] - node_begin[node]; }
};

enum class TreeShape {
    kLevels,     // every leaf at the same depth
    kStaggered,  // the last leaves feed the root itself, so they may end one merge later
};

// Merges `num_leaves` >= 2 leaves. Overwrites `tree`, whose memory is reused.
void build_merge_tree(int num_leaves, TreeShape shape, MergeTree& tree);

// Leaves of a staggered tree that do not feed the root directly; they come first.
constexpr int num_early_leaves(int num_leaves) {
    if (num_leaves <= kMaxReductionInputs) return 0;
    // A subtree takes one input of the root and gives it kMaxReductionInputs leaves.
    constexpr int kGain = kMaxReductionInputs - 1;
    const int subtrees = (num_leaves - kMaxReductionInputs + kGain - 1) / kGain;
    return subtrees <= kMaxReductionInputs ? num_leaves - (kMaxReductionInputs - subtrees)
                                           : num_leaves;
}

}  // namespace mla
