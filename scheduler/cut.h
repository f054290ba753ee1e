// Where each sequence's KV is cut into pieces, and in what order the pieces start.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "scheduler/cost_model.h"
#include "scheduler/merge_tree.h"
#include "scheduler/problem.h"

namespace mla {

// KV tiles [begin_tile, end_tile) of one of the problem's sequences, for all of its row
// groups.
struct Piece {
    int32_t sequence;
    int32_t begin_tile;
    int32_t end_tile;
    int32_t num_mates = 1;    // workers of a cluster that share it, for each row group
    bool is_adopted = false;  // by the sequence's first piece; this is the last one then
};

struct Cut {
    std::vector<Piece> pieces;         // by sequence, then by position
    std::vector<int32_t> first_piece;  // sequence i: pieces[first_piece[i], first_piece[i + 1])
    std::vector<int32_t> start_order;  // indices into pieces
    // By sequence, where the policy grew its own; otherwise one merge reads all pieces.
    std::vector<MergeTree> trees;

    int num_mates() const {  // the most of a piece
        int most = 1;
        for (const Piece& piece : pieces) most = std::max(most, piece.num_mates);
        return most;
    }
    int num_pieces(int sequence) const { return first_piece[sequence + 1] - first_piece[sequence]; }
    bool adopts(int sequence) const {
        return num_pieces(sequence) > 0 && pieces[first_piece[sequence + 1] - 1].is_adopted;
    }
    // That the pieces of a sequence leave to merge.
    int num_results(int sequence) const { return num_pieces(sequence) - adopts(sequence); }
    bool merges_nothing() const {
        const int num_sequences = static_cast<int>(first_piece.size()) - 1;
        for (int i = 0; i < num_sequences; ++i) {
            if (num_results(i) > 1) return false;
        }
        return true;
    }
};

// One piece per sequence, the longest first.
Cut cut_unsplit(const Problem& problem);

// Pieces of `split_tiles` tiles, the last of a sequence shorter.
Cut cut_fixed(const Problem& problem, int split_tiles);

// Every sequence in equal pieces, as few as let all of them, and the reductions behind
// them, end together when at most `max_gangs` gangs run, one piece each. Needs max_gangs
// >= problem.gangs_unsplit().
Cut cut_even(const Problem& problem, const CostModel& cost, int max_gangs);

// The same with clusters: a sequence's workers are mates of one cluster, or of several, which have
// a piece each; in one if that is possible at all, or if it takes no more of them. At most
// `max_workers` work, a power of two on a piece, up to `cluster_ctas`. Larger groups of mates start
// first, so that none is in two clusters. Empty if there is no such cut.
Cut cut_into_clusters(const Problem& problem,
                      const CostModel& cost,
                      int cluster_ctas,
                      bool in_one_if_possible,
                      int max_workers);

enum class LineOrder { kGiven, kLongestFirst };

// Lays sequences of one number of row groups on a line and cuts it where a gang of workers is full,
// so that all gangs end together; sequences of another number have a line and gangs of their own.
// No piece of a split sequence is below `min_tiles`. Empty if the costs are too far apart to be
// added.
Cut cut_line(const Problem& problem, const CostModel& cost, int min_tiles, LineOrder order);

}  // namespace mla
