// How long things take on one GPU. Every constant is in microseconds and has a
// name; cost_models/<device>.json holds the fitted values, tools/fit_cost_model.py
// fits them.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "scheduler/spread.h"

namespace mla {

struct CostModel {
    // From the start of the kernel's slot in the stream until its CTAs hold instructions.
    double launch_us = 2.0;

    // Fetching and decoding one instruction when nothing hides it. It is all that a
    // no-op costs, and it is inside the fixed costs of the other opcodes.
    double instruction_us = 0.3;

    // What a partial costs before its tiles stream: Q, the first TMA round trip; and
    // the end of the epilogue. The first instruction of an SM pays all of it; a later one
    // loads while its predecessor's epilogue drains.
    double partial_fixed_us = 4.0;
    double partial_next_us = 2.0;
    // One KiB of result stored, after the last tile. A row has 2 KiB in scratch (fp32),
    // 1 KiB in the output (16 bits).
    double partial_store_kib_us = 0.006;

    // What mates, workers of a cluster that share a partial, take longer than one worker whose
    // result needs no merging; and one KiB of columns, as floats, that one sends to the others.
    double mates_fixed_us = 1.0;
    double mates_kib_us = 0.03;
    // What they take longer than that when it is merged further: until all of it is visible.
    double mates_flag_us = 1.0;

    // What a partial takes longer that adopts another's result; and one KiB of that (2 KiB a row).
    double adopt_fixed_us = 1.3;
    double adopt_kib_us = 0.025;

    // One 64-token KV tile (73,728 bytes): the time that the memory system needs when
    // it does nothing else. SMs that stream at once share it.
    double partial_tile_us = 0.01603;  // 73,728 B at 4.6 TB/s
    // The least time between two tiles of one SM, whatever the others do: products and softmax. A
    // partial of a narrow kernel that has one tile takes as long as with two.
    double partial_tile_compute_us = 1.45;
    // What every other SM that streams something else at the same time adds to that: loads take
    // longer to come back from a busy memory system, long before its bandwidth is used up.
    double partial_tile_contention_us = 0.0;

    // What a reduction costs besides its bytes, from its last flag seen to its result
    // stored; and the same when it follows another instruction and need not wait.
    double reduction_fixed_us = 2.0;
    double reduction_next_us = 1.2;
    // What it takes less, having waited, if it finds its inputs by their stamps, see fits_stamps.
    double reduction_stamps_us = 0.0;
    // One KiB of fp32 input read by one SM, mostly from L2.
    double reduction_kib_us = 0.016;

    // From the end of an instruction until an SM that waits for its flag has seen it.
    double dependency_us = 0.7;

    // Time per tile of one SM while `num_streams` SMs stream, and `kv_sharing` of them on the
    // mean (row groups of one sequence) read the same tile.
    double tile_us(int num_streams, double kv_sharing) const {
        return stream_tile_us(num_streams / kv_sharing);
    }

    // The same, told how many different tiles are read at a time.
    double stream_tile_us(double num_different) const {
        return rate_limited_us(num_different, partial_tile_contention_us, partial_tile_us);
    }

    // The same where the workers are spread evenly over the GPU, see spread.h.
    double spread_tile_us(double num_different) const {
        return rate_limited_us(num_different,
                               kSpreadContention * partial_tile_contention_us,
                               kSpreadMemory * partial_tile_us);
    }

  private:
    double rate_limited_us(double num_different, double contention_us, double memory_us) const {
        return std::max(partial_tile_compute_us + contention_us * std::max(num_different - 1, 0.0),
                        memory_us * num_different);
    }
};

struct CostField {
    const char* name;
    double CostModel::* value;
};

// The one list of field names, for bindings and data files.
inline constexpr CostField kCostFields[] = {
    {"launch_us", &CostModel::launch_us},
    {"instruction_us", &CostModel::instruction_us},
    {"partial_fixed_us", &CostModel::partial_fixed_us},
    {"partial_next_us", &CostModel::partial_next_us},
    {"partial_store_kib_us", &CostModel::partial_store_kib_us},
    {"mates_fixed_us", &CostModel::mates_fixed_us},
    {"mates_kib_us", &CostModel::mates_kib_us},
    {"mates_flag_us", &CostModel::mates_flag_us},
    {"adopt_fixed_us", &CostModel::adopt_fixed_us},
    {"adopt_kib_us", &CostModel::adopt_kib_us},
    {"partial_tile_us", &CostModel::partial_tile_us},
    {"partial_tile_compute_us", &CostModel::partial_tile_compute_us},
    {"partial_tile_contention_us", &CostModel::partial_tile_contention_us},
    {"reduction_fixed_us", &CostModel::reduction_fixed_us},
    {"reduction_next_us", &CostModel::reduction_next_us},
    {"reduction_stamps_us", &CostModel::reduction_stamps_us},
    {"reduction_kib_us", &CostModel::reduction_kib_us},
    {"dependency_us", &CostModel::dependency_us},
};

// Throws std::invalid_argument unless every time is finite and >= 0, and a tile takes time.
inline void check_cost_model(const CostModel& cost) {
    for (const CostField& field : kCostFields) {
        const double value = cost.*field.value;
        if (std::isfinite(value) && value >= 0.0) continue;
        throw std::invalid_argument(std::string(field.name) +
                                    ": expected a finite time of at least 0 us, got " +
                                    std::to_string(value));
    }
    if (cost.partial_tile_compute_us <= 0.0) {
        throw std::invalid_argument("partial_tile_compute_us: expected more than 0 us, got 0");
    }
}

}  // namespace mla
