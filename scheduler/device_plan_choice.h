// What the device planner expects of a way to cut, by closed formulas: no search, no simulation.
// Times begin where the first tile could, and leave out what all ways have in common.
#pragma once

#include <cstdint>

#include "scheduler/device_plan_cut.h"
#include "scheduler/device_plan_problem.h"

namespace mla {

// Of the whole batch.
struct BatchTotals {
    uint32_t tiles = 0;                 // times row groups
    uint32_t groups = 0;                // of sequences with keys
    uint32_t longest = 0;               // sequence, in tiles
    uint32_t num_bad = 0;               // lengths
    uint32_t bad_request = UINT32_MAX;  // the first
};

// Of all sequences, cut in one way.
struct CutTotals {
    uint32_t partials = 0;
    uint32_t slots = 0;   // partials that are merged
    uint32_t merges = 0;  // row groups of sequences that are split
    uint32_t full = 0;    // row groups of sequences that are about as long as a piece, or longer

    MLA_HOST_DEVICE void add(uint32_t pieces, uint32_t groups) {
        partials += pieces * groups;
        if (pieces <= 1) return;
        slots += pieces * groups;
        merges += groups;
    }
};

// Of all sequences, each shared by mates.
struct MatesTotals {
    uint32_t mates = 0;
    uint32_t most_log2 = 0;   // mates of a row group
    uint32_t most_tiles = 0;  // of a mate
};

// Workers that have time to merge. Where every partial has its own, those that work on whole
// sequences are late; and the last slice of a row group is seldom full.
MLA_HOST_DEVICE uint32_t merging_workers(const DevicePlanProblem& p, const CutTotals& cut) {
    const uint32_t workers = p.num_workers;
    const uint32_t whole = cut.partials <= workers ? cut.partials - cut.slots : 0;
    return workers - device_plan::smaller(whole + cut.merges, workers) / 2;
}

// Rows of O that each of them reads.
MLA_HOST_DEVICE uint32_t merged_eighths(const DevicePlanProblem& p, const CutTotals& cut) {
    const uint32_t workers = merging_workers(p, cut);
    return (cut.slots * p.constants.slot_eighths + workers - 1) / workers;
}

class Estimate {
  public:
    MLA_HOST_DEVICE Estimate(const DevicePlanProblem& p, const BatchTotals& batch)
        : p_(p), batch_(batch) {}

    // Candidate 0 is the line; the last one cuts nothing. Between them, pieces that fill every
    // worker once, then longer and longer ones.
    MLA_HOST_DEVICE uint32_t tiles(uint32_t candidate) const {
        const uint32_t longest = device_plan::larger(batch_.longest, 1u);
        if (is_whole(candidate)) return longest;
        const uint32_t shortest = batch_.tiles / p_.constants.workers, i = candidate;
        const uint32_t tiles = shortest + i - 1 + (shortest * (i * i + 4 * i) >> 9);
        return device_plan::clamp(tiles, 1u, longest);
    }
    // A line is better than pieces that workers take one after the other.
    MLA_HOST_DEVICE bool may_be_best(uint32_t candidate) const {
        const uint32_t workers = p_.num_workers;
        return is_whole(candidate) || !p_.uniform() || batch_.groups <= workers;
    }

    // That begin the queue, see spread.h.
    MLA_HOST_DEVICE int noops(const CutTotals& cut) const {
        return cut.slots == 0 ? p_.noops_before(cut.partials) : 0;
    }
    MLA_HOST_DEVICE int noops(const MatesTotals& cut) const {
        const bool are_long_pairs = cut.most_log2 <= 1 && cut.most_tiles >= kLeastTilesOfMates;
        return are_long_pairs ? p_.noops_before(cut.mates) & -2 : 0;
    }

    // Pieces of a length, at most the longest sequence's.
    MLA_HOST_DEVICE uint32_t pieces_ns(const EvenCut& even, const CutTotals& cut) const {
        const uint32_t workers = p_.num_workers;
        if (cut.slots > 2 * workers) return kNever;
        const uint64_t tile = p_.tile_ns(device_plan::smaller(cut.partials, workers), noops(cut));
        const uint64_t whole = device_plan::smaller(batch_.longest, even.longest_whole) * tile;
        const uint64_t piece = device_plan::larger(even.tiles, p_.least_tiles()) * tile;
        // Rows are rounded to slices; the more the more pieces they have.
        const uint32_t merged = merged_eighths(p_, cut) / 8 + batch_.longest / even.by_tiles / 4;
        const uint64_t merge = cut.slots == 0 ? 0 : merge_ns(merged);
        if (cut.partials <= workers) return saturated(device_plan::larger(whole, piece + merge));
        // Workers take one after the other, the longest first.
        const uint64_t next = p_.cost.partial_next;
        const uint64_t late = cut.slots == 0 ? piece / 8 : piece / 2;
        const uint64_t waves = num_waves(cut.full) * (next + piece);
        const uint64_t share = share_ns(cut.partials, tile) + tile + late;
        // None is longer than a piece: as many waves as there are, all of them full, are the most.
        const uint64_t most = num_waves(cut.partials) * (next + piece);
        return saturated(device_plan::smaller(device_plan::larger(waves, share), most) + merge);
    }

    MLA_HOST_DEVICE uint32_t mates_ns(const MatesTotals& cut) const {
        if (cut.mates > static_cast<uint32_t>(p_.num_workers)) return kNever;
        const uint64_t tile = p_.tile_ns(cut.mates, noops(cut));
        return saturated(device_plan::larger(cut.most_tiles, p_.least_tiles()) * tile +
                         p_.constants.mates[cut.most_log2]);
    }

    // A line of all sequences, cut where a worker's share of it ends.
    MLA_HOST_DEVICE uint32_t line_ns(const CutTotals& whole) const {
        const uint32_t workers = p_.num_workers;
        const bool is_short =
            batch_.tiles <= kMaxLineTiles && batch_.longest <= p_.constants.most_tiles;
        if (!p_.uniform() || !is_short || batch_.tiles < kLineTiles * workers) return kNever;
        const uint64_t tile = p_.tile_ns(workers);
        return saturated(share_ns(whole.partials, tile) + (p_.cost.partial_next + tile) / 2 +
                         merge_ns(2 * p_.most_group_rows()));
    }

    static constexpr uint32_t kNever = UINT32_MAX;
    static constexpr uint32_t kLineTiles = 4;           // that are worth a worker's while
    static constexpr uint32_t kMaxLineTiles = 1 << 26;  // 30 bits in 1/16 tile

  private:
    MLA_HOST_DEVICE static bool is_whole(uint32_t candidate) {
        return candidate == 0 || candidate == device_plan::kCandidates - 1;
    }
    MLA_HOST_DEVICE uint32_t num_waves(uint32_t partials) const {
        return (partials + p_.num_workers - 1) / p_.constants.workers;
    }
    // What a worker does of so many partials.
    MLA_HOST_DEVICE uint64_t share_ns(uint32_t partials, uint64_t tile) const {
        const device_plan::Reciprocal workers = p_.constants.workers;
        return (device_plan::scaled(partials, workers, 6) * p_.cost.partial_next +
                device_plan::scaled(batch_.tiles, workers, 6) * tile) >>
               6;
    }
    // Of rows of O that one reduction reads.
    MLA_HOST_DEVICE uint64_t merge_ns(uint32_t rows) const {
        return p_.cost.dependency + p_.cost.reduction_fixed +
               (uint64_t{p_.cost.reduction_row_1024} * rows >> 10);
    }
    MLA_HOST_DEVICE static uint32_t saturated(uint64_t ns) {
        return static_cast<uint32_t>(device_plan::smaller(ns, uint64_t{kNever - 1}));
    }

    const DevicePlanProblem& p_;
    const BatchTotals& batch_;
};

}  // namespace mla
