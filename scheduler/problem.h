// What is to be planned: the sequences that have something to compute, the tokens that have
// nothing, and the machine's width.
#pragma once

#include <cstdint>
#include <vector>

#include "scheduler/batch.h"

namespace mla {

// Has rows and keys.
struct Sequence {
    int32_t id;      // in the batch
    int32_t length;  // KV positions, new tokens included
    int32_t num_rows;
    int32_t row_groups;

    int num_tiles() const { return ceil_div(length, kKvTile); }
};

// Workers are counted in gangs, one worker per row group, if all sequences have the same
// number of row groups: a gang runs the row groups of a piece side by side. Otherwise a
// gang is one worker.
struct Problem {
    std::vector<Sequence> sequences;
    std::vector<TokenRange> fills;
    int num_heads = 0;
    int group_rows = kMaxRows;
    int num_workers = 0;          // CTAs, one per SM
    bool leaves_sms_out = false;  // clusters that are not on all of them
    int gang_size = 1;
    bool uniform = true;      // in row groups
    double kv_sharing = 1.0;  // row groups that read the same KV: their mean over the tiles

    int num_sequences() const { return static_cast<int>(sequences.size()); }
    int num_tiles(int sequence) const { return sequences[sequence].num_tiles(); }
    int row_groups(int sequence) const { return sequences[sequence].row_groups; }
    // Of a sequence's row group from `row` on.
    int rows_from(int sequence, int row) const {
        const int left = sequences[sequence].num_rows - row;
        return left < group_rows ? left : group_rows;
    }
    // That a piece of this sequence keeps busy.
    int gangs_per_piece(int sequence) const { return row_groups(sequence) / gang_size; }
    int num_gangs() const { return num_workers > gang_size ? num_workers / gang_size : 1; }
    int longest() const;  // tiles of the longest sequence; 0 without sequences
    // One piece per sequence: gangs that they would keep busy.
    int64_t gangs_unsplit() const;
    int64_t workers_unsplit() const { return gangs_unsplit() * gang_size; }
};

// Flat tokens that one fill may cover: short enough to go anywhere.
int tokens_per_fill(int num_heads);

// Of a batch that check_batch() accepts.
Problem make_problem(const Batch& batch, int num_workers);

}  // namespace mla
