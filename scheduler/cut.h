// Where each request's KV is cut into pieces, and in what order the pieces start.
#pragma once

#include <cstdint>
#include <vector>

#include "scheduler/cost_model.h"
#include "scheduler/merge_tree.h"
#include "scheduler/problem.h"

namespace mla {

// KV tiles [begin_tile, end_tile) of one request, for all of its row groups.
struct Piece {
    int32_t request;
    int32_t begin_tile;
    int32_t end_tile;
};

struct Cut {
    std::vector<Piece> pieces;         // by request, then by position
    std::vector<int32_t> first_piece;  // request i: pieces[first_piece[i], first_piece[i + 1])
    std::vector<int32_t> start_order;  // indices into pieces
    TreeShape shape = TreeShape::kStaggered;
    std::vector<MergeTree> trees;  // by request, where the policy grew its own

    int num_pieces(int request) const { return first_piece[request + 1] - first_piece[request]; }
};

// One piece per request, the longest first.
Cut cut_unsplit(const Problem& problem);

// Pieces of `split_tiles` tiles, the last of a request shorter.
Cut cut_fixed(const Problem& problem, int split_tiles);

// Every request in equal pieces, as few as let all of them, and the reductions behind
// them, end together when at most `max_pieces` run, each on a gang of its own. Needs
// max_pieces >= number of requests; `shape` is the tree that will merge them.
Cut cut_even(const Problem& problem, const CostModel& cost, int max_pieces, TreeShape shape);

enum class LineOrder { kGiven, kLongestFirst };

// Lays all requests on a line and cuts it where a gang of workers is full, so that
// `num_gangs` gangs end together. No piece of a split request is below `min_tiles`. Empty
// if the costs are too far apart to be added.
Cut cut_line(const Problem& problem,
             const CostModel& cost,
             int num_gangs,
             int min_tiles,
             LineOrder line_order);

// `counts[i]` nearly equal pieces of request i.
Cut cut_into(const Problem& problem, const std::vector<int32_t>& counts);

}  // namespace mla
