// How the pieces of one sequence are merged when one reduction shall not read them all.
#pragma once

#include <cstdint>
#include <vector>

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

}  // namespace mla
