// What one task costs, by the constants of the cost model.
#pragma once

#include "scheduler/cost_model.h"
#include "scheduler/task_graph.h"

namespace mla {

inline constexpr double kBytesPerKib = 1024;

inline double num_kv_tiles(const Task& partial) {
    const int64_t tokens = int64_t{partial.end} - partial.start;
    return tokens <= 0 ? 0.0 : static_cast<double>((tokens + kKvTile - 1) / kKvTile);
}

// Before the first tile. `follows`: its worker ran an instruction before.
inline double partial_lead_us(bool follows, const CostModel& cost) {
    return follows ? cost.partial_next_us : cost.partial_fixed_us;
}

// Of the mate that has most of them.
inline double num_tiles_of_mate(const Task& partial) {
    const double tiles = num_kv_tiles(partial);
    return partial.num_mates == 1 ? tiles : std::ceil(tiles / partial.num_mates);
}

// After the last tile, and once the result that it adopts is visible.
inline double partial_store_us(const Task& partial, const CostModel& cost) {
    const double bytes_per_row = kLatentDim * (partial.to_output ? 2.0 : 4.0);
    const double store_us =
        cost.partial_store_kib_us * partial.num_rows * bytes_per_row / kBytesPerKib;
    if (partial.adopted != kNoTask) {
        const double adopted_kib = partial.num_rows * kLatentDim * 4.0 / kBytesPerKib;
        return cost.adopt_fixed_us + cost.adopt_kib_us * adopted_kib + store_us;
    }
    if (partial.num_mates == 1) return store_us;
    const double share = 1.0 / partial.num_mates;
    // Every mate sends the others their columns.
    const double sent_kib = partial.num_rows * kLatentDim * 4.0 * (1.0 - share) / kBytesPerKib;
    const double flag_us = partial.to_output ? 0.0 : cost.mates_flag_us;
    return cost.mates_fixed_us + cost.mates_kib_us * sent_kib + flag_us + store_us * share;
}

// Once its inputs are visible. `follows`: its worker ran an instruction before, and the
// inputs were there already.
inline double reduction_us(
    int num_inputs, int num_rows, int num_cols, bool follows, const CostModel& cost) {
    const double bytes = 4.0 * num_inputs * num_rows * num_cols;
    const double bytes_us = cost.reduction_kib_us * bytes / kBytesPerKib;
    if (follows) return cost.reduction_next_us + bytes_us;
    const bool by_stamps = fits_stamps(num_rows * (num_cols / kColumnChunk), num_inputs);
    const double gain_us = by_stamps ? cost.reduction_stamps_us : 0.0;
    return std::max(cost.reduction_fixed_us - gain_us, 0.0) + bytes_us;
}

// All of it. One SM stores zeros about as fast as it streams tiles.
inline double fill_us(const Task& fill, const CostModel& cost) {
    constexpr double kTileBytes = kKvTile * (kLatentDim + kRopeDim) * 2.0;
    const double bytes = kLatentDim * 2.0 * fill.num_rows;
    return cost.instruction_us + cost.partial_tile_compute_us * bytes / kTileBytes;
}

}  // namespace mla
