// How the device planner cuts: every sequence into pieces of a length, or a line of all sequences
// into shares. What a sequence's pieces are follows from a few numbers, so no piece is stored.
#pragma once

#include <cstdint>

#include "scheduler/device_plan_problem.h"

namespace mla {

// Sequences of more than `longest_whole` tiles are cut every `tiles` tiles.
struct EvenCut {
    uint32_t tiles;
    uint32_t longest_whole;
    device_plan::Reciprocal by_tiles;

    MLA_HOST_DEVICE EvenCut(uint32_t tiles, uint32_t margin)
        : tiles(tiles), longest_whole(tiles + margin), by_tiles(device_plan::reciprocal(tiles)) {}

    MLA_HOST_DEVICE uint32_t num_pieces(uint32_t sequence_tiles) const {
        if (sequence_tiles <= longest_whole) return sequence_tiles > 0 ? 1 : 0;
        const uint32_t before_last = (sequence_tiles - 1) / by_tiles;
        // The quotient of a large number may be one too many.
        return before_last + (before_last * tiles < sequence_tiles ? 1 : 0);
    }
    MLA_HOST_DEVICE uint32_t nearly_full() const { return tiles - tiles / 16; }

    // Or a sequence is one piece, shared by as many mates that none has more than `tiles`: if there
    // are so many.
    MLA_HOST_DEVICE uint32_t log2_mates(uint32_t sequence_tiles, uint32_t cluster_ctas) const {
        const uint32_t most = device_plan::smaller(sequence_tiles, cluster_ctas);
        uint32_t log2 = 0;
        MLA_SHORT_LOOP
        while (tiles << log2 < sequence_tiles && 2u << log2 <= most) ++log2;
        return log2;
    }
};

// Sequences lie on the line one behind the other, each with what it costs to begin. Lengths on it
// are in 1/16 tile.
struct LineCut {
    uint64_t share_256;  // of a gang, in 1/256 of that
    uint32_t num_gangs;
    uint32_t gangs_per_line;  // times 2^32, rounded down
    uint32_t lead;            // of a sequence, before its first tile

    LineCut() = default;
    MLA_HOST_DEVICE LineCut(const DevicePlanProblem& p, uint32_t line)
        : share_256(device_plan::scaled(line, p.constants.by_gangs, 8)),
          num_gangs(p.constants.gangs),
          gangs_per_line(UINT32_MAX / device_plan::larger(line, 1u) * num_gangs),
          lead(p.constants.line_lead) {}

    MLA_HOST_DEVICE uint32_t position(uint32_t cut) const {
        return static_cast<uint32_t>(share_256 * cut >> 8);
    }
    MLA_HOST_DEVICE uint32_t longest_piece() const {  // about
        return position(1) / 16 + 2 * device_plan::kMinTiles;
    }
    // Cuts 1, 2, ... are between gangs.
    MLA_HOST_DEVICE uint32_t cuts_until(uint32_t at) const {
        auto cuts = static_cast<uint32_t>(uint64_t{at} * gangs_per_line >> 32);  // or more
        MLA_SHORT_LOOP
        while (cuts + 1 < num_gangs && position(cuts + 1) <= at) ++cuts;
        return cuts;
    }
    // Tile of a sequence that lies at `begin`. Negative before its first.
    MLA_HOST_DEVICE int32_t tile(uint32_t cut, uint32_t begin) const {
        return static_cast<int32_t>(position(cut) + 8 - begin - lead) >> 4;
    }

    struct Cuts {
        uint32_t first, count;
    };
    // Those inside a sequence, without the ones that leave too little at an end of it.
    MLA_HOST_DEVICE Cuts inside(uint32_t begin, uint32_t end, int32_t tiles) const {
        uint32_t first = cuts_until(begin) + 1;
        uint32_t end_cut = cuts_until(end - 1) + 1;
        if (first < end_cut && tile(first, begin) < device_plan::kMinTiles) ++first;
        if (first < end_cut && tile(end_cut - 1, begin) > tiles - device_plan::kMinTiles) --end_cut;
        return {first, end_cut - first};
    }
};

// Slices of a sequence's reductions, of so many rows or of single rows of so many columns.
struct Slices {
    uint32_t rows, log2_columns;  // 2^log2_columns slices side by side

    // So that each reads so many rows of O in all; these and the row in eighths.
    MLA_HOST_DEVICE static Slices of(const DevicePlanProblem& p,
                                     uint32_t pieces,
                                     uint32_t group_rows,
                                     uint32_t merged_eighths) {
        const uint32_t eighths = (merged_eighths + pieces - 1) / p.reciprocal(pieces);
        if (eighths > 4) {
            return {device_plan::smaller(group_rows, (eighths + 7) / 8), 0};
        }
        return {1, eighths > 2 ? 1u : eighths > 1 ? 2u : 3u};
    }
    // What a row group and its pieces alone decide, whatever else is in the batch: by rows, then by
    // columns, at most one slice per piece. As the host's.
    MLA_HOST_DEVICE static Slices batch_invariant(const DevicePlanProblem& p,
                                                  uint32_t pieces,
                                                  uint32_t group_rows) {
        uint32_t slices = 1;
        Slices made{group_rows, 0};
        MLA_SHORT_LOOP
        for (; 2 * slices <= pieces && made.log2_columns < 3; slices *= 2) {
            if (made.rows > 1) {
                made.rows = (group_rows + 2 * slices - 1) / p.reciprocal(2 * slices);
            } else {
                ++made.log2_columns;
            }
        }
        return made;
    }
    MLA_HOST_DEVICE uint32_t num_of(const DevicePlanProblem& p, uint32_t group_rows) const {
        return (group_rows + rows - 1) / p.constants.small[rows] << log2_columns;
    }
    MLA_HOST_DEVICE uint32_t pack() const { return rows << 2 | log2_columns; }
    MLA_HOST_DEVICE static Slices unpack(uint32_t word) { return {word >> 2, word & 3}; }
};

}  // namespace mla
