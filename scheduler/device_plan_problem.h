// What a device plan is made from, and how large it can become.
#pragma once

#include <cstdint>
#include <type_traits>

#include "instructions/host_device.h"
#include "instructions/layout.h"
#include "scheduler/spread.h"

// Before a loop: the planner's code is executed once, so fetching it counts for more than steps.
#ifdef __CUDA_ARCH__
#define MLA_SHORT_LOOP _Pragma("unroll 1")
#else
#define MLA_SHORT_LOOP
#endif

namespace mla {

namespace device_plan {

inline constexpr int kMaxGroups = 32;          // row groups of a sequence
inline constexpr int kFillSequences = 16;      // that one fill may cover
inline constexpr int kFillTokens = 64;         // of padding
inline constexpr int kCandidates = 32;         // ways to cut that are compared
inline constexpr int kKeys = 32;               // classes of lengths that pieces are sorted by
inline constexpr int kSortGroup = 32;          // pieces that are sorted together
inline constexpr int kMinTiles = 2;            // of a piece of a sequence that a line cuts
inline constexpr uint32_t kMaxLineLead = 512;  // in 1/16 tile
inline constexpr int64_t kMaxInstructions = (1 << 21) - 1;
inline constexpr uint32_t kMaxCost = 1 << 24;  // of any constant

template <class T>
MLA_HOST_DEVICE T ceil_div(T a, T b) {
    return a / b + (a % b != 0);
}
template <class T>
MLA_HOST_DEVICE T smaller(T a, T b) {
    return a < b ? a : b;
}
template <class T>
MLA_HOST_DEVICE T larger(T a, T b) {
    return a > b ? a : b;
}
template <class T>
MLA_HOST_DEVICE T clamp(T x, T low, T high) {
    return smaller(larger(x, low), high);
}

// Division by what is divided by often, and found on the GPU: x / d if x * d < 2^31, otherwise that
// or one more. (mla::Divisor is exact, and takes a loop to make.)
struct Reciprocal {
    uint32_t inverse;
};
MLA_HOST_DEVICE Reciprocal reciprocal(uint32_t d) { return {0x80000000u / d + 1}; }
MLA_HOST_DEVICE uint64_t scaled(uint32_t x, Reciprocal d, int shift) {  // (x << shift) / d
    return uint64_t{x} * d.inverse >> (31 - shift);
}
MLA_HOST_DEVICE uint32_t operator/(uint32_t x, Reciprocal d) {
    return static_cast<uint32_t>(scaled(x, d, 0));
}

}  // namespace device_plan

// The constants of a CostModel, in nanoseconds; those that are multiplied with many in 1/1024 of
// one. None is larger than device_plan::kMaxCost.
struct DevicePlanCost {
    uint32_t partial_next, tile_compute, reduction_fixed, dependency;
    uint32_t tile_1024, tile_contention_1024, reduction_row_1024;  // of 2 KiB
    uint32_t mates_fixed, mates_row_1024, store_row_1024;          // of 2 KiB; of 1 KiB
};

// Time per tile and stream, 1/1024 ns, with what row groups share.
struct TileRate {
    uint32_t memory_1024, contention_1024;
};

// What follows from a problem, so that no thread divides.
struct DevicePlanConstants {
    device_plan::Reciprocal workers;
    TileRate rate, spread_rate;  // the latter where no-ops begin the queue
    // Workers that run the row groups of a piece side by side are a gang.
    uint32_t gangs;
    device_plan::Reciprocal by_gangs;
    uint32_t line_lead;     // before the first tile of a sequence, in 1/16 tile
    uint32_t slot_eighths;  // of rows: what a slot holds in the mean
    uint32_t mates[4];      // what 1, 2, 4, 8 of them take longer than a piece
    uint32_t margin;        // tiles that a sequence may have beyond a piece before it is cut
    uint32_t top_step;      // of a binary search for a sequence
    uint32_t most_partials;
    device_plan::Reciprocal small[kMaxRows + 1];  // by 1, 2, ...
    uint32_t most_tiles;  // that count of a sequence, so that sums have 31 bits
};

struct DevicePlanProblem {
    const int32_t* seq_lens;      // [num_requests]
    const int32_t* cu_seqlens_q;  // [num_requests + 1], or null: s_q tokens each
    const int32_t* kv_indptr;     // [num_requests + 1] in blocks, or null: max_seq_len of each
    int block_size;               // of the cache; with kv_indptr only
    int num_requests;
    int num_kv_heads;
    int s_q;           // the most new tokens of a request
    int total_tokens;  // of one KV head
    int num_heads;     // query heads per KV head
    int max_seq_len;
    int num_workers;
    int split_tiles;   // > 0: every sequence is cut so, whatever else is in the batch
    int cluster_ctas;  // of the launch, a divisor of num_workers: 2, 4 or 8; 1: no clusters
    int group_log2;    // of the rows of a row group: 6, 5 or 4
    DevicePlanCost cost;
    DevicePlanConstants constants;  // see with_constants()

    // The longest that a request may be.
    MLA_HOST_DEVICE int limit_of(int request) const {
        if (kv_indptr == nullptr) return max_seq_len;
        const int64_t blocks = int64_t{kv_indptr[request + 1]} - kv_indptr[request];
        return static_cast<int>(
            device_plan::clamp(blocks * block_size, int64_t{0}, int64_t{max_seq_len}));
    }
    MLA_HOST_DEVICE int num_sequences() const { return num_requests * num_kv_heads; }
    MLA_HOST_DEVICE int max_rows() const { return s_q * num_heads; }
    MLA_HOST_DEVICE int group_rows() const { return 1 << group_log2; }
    // Row groups of so many rows.
    MLA_HOST_DEVICE int groups_of(int rows) const {
        return (rows + group_rows() - 1) >> group_log2;
    }
    MLA_HOST_DEVICE int max_groups() const { return groups_of(max_rows()); }
    MLA_HOST_DEVICE uint32_t most_group_rows() const {
        return static_cast<uint32_t>(device_plan::smaller(group_rows(), max_rows()));
    }
    // Tiles that take no longer than one.
    MLA_HOST_DEVICE uint32_t least_tiles() const {
        return most_group_rows() <= kNarrowRows ? kNarrowTilesAtOnce : 1;
    }
    // Time per tile of a worker while `streams` work.
    MLA_HOST_DEVICE uint32_t tile_ns(const TileRate& rate, uint32_t streams) const {
        const uint64_t contention = uint64_t{rate.contention_1024} * (streams - 1);
        const uint64_t memory = uint64_t{rate.memory_1024} * streams;
        return device_plan::larger(cost.tile_compute + static_cast<uint32_t>(contention >> 10),
                                   static_cast<uint32_t>(memory >> 10));
    }
    // The same where so many no-ops begin the queue.
    MLA_HOST_DEVICE uint32_t tile_ns(uint32_t streams, int noops = 0) const {
        return tile_ns(noops > 0 ? constants.spread_rate : constants.rate, streams);
    }
    // No-ops before so many partials, which are whole sequences.
    MLA_HOST_DEVICE int noops_before(int partials) const {
        return max_groups() == 1 ? noops_to_spread(num_workers, partials) : 0;
    }
    MLA_HOST_DEVICE device_plan::Reciprocal reciprocal(uint32_t d) const {
        return d <= kMaxRows ? constants.small[d] : device_plan::reciprocal(d);
    }
    MLA_HOST_DEVICE bool balances() const { return split_tiles == 0; }
    MLA_HOST_DEVICE bool has_clusters() const { return cluster_ctas > 1; }
    // All sequences with rows have as many row groups.
    MLA_HOST_DEVICE bool uniform() const { return cu_seqlens_q == nullptr || max_groups() == 1; }
};

// What any batch of these sizes can need.
struct DevicePlanCapacity {
    int64_t instructions;  // end marks included
    int64_t slots;
    int64_t pieces;
    int64_t partials;
};
inline DevicePlanCapacity device_plan_capacity(const DevicePlanProblem& p) {
    using device_plan::ceil_div;
    const int64_t sequences = p.num_sequences();
    const int64_t groups = p.max_groups();
    DevicePlanCapacity capacity{};
    int64_t reductions;
    if (p.split_tiles > 0) {
        const int tiles = ceil_div(p.max_seq_len, kKvTile);
        capacity.pieces = sequences * device_plan::larger(1, ceil_div(tiles, p.split_tiles));
        capacity.slots = capacity.pieces * groups;
        reductions = capacity.slots;  // a slice per piece
    } else {
        // A line is cut once for each worker; other pieces that are merged are two for each.
        capacity.pieces = sequences + 2 * p.num_workers;
        capacity.slots = 2 * int64_t{p.num_workers} + groups;
        reductions = 4 * int64_t{p.num_workers};
    }
    const int64_t fills = sequences + int64_t{p.num_kv_heads} *
                                          (1 + ceil_div(p.total_tokens, device_plan::kFillTokens));
    capacity.partials = capacity.pieces * groups;
    capacity.instructions = capacity.partials + reductions + fills + p.num_workers;
    return capacity;
}

inline DevicePlanProblem with_constants(const DevicePlanProblem& problem) {
    DevicePlanProblem p = problem;
    DevicePlanConstants& k = p.constants;
    const uint32_t workers = p.num_workers, groups = p.max_groups();
    k.most_partials = static_cast<uint32_t>(device_plan_capacity(problem).partials);
    for (uint32_t d = 1; d <= kMaxRows; ++d) k.small[d] = device_plan::reciprocal(d);
    k.most_tiles = static_cast<uint32_t>(INT32_MAX / (int64_t{groups} * p.num_sequences()));
    k.workers = device_plan::reciprocal(workers);
    const uint32_t sharing = p.uniform() ? groups : 1;
    k.rate = {p.cost.tile_1024 / sharing, p.cost.tile_contention_1024 / sharing};
    k.spread_rate = {static_cast<uint32_t>(k.rate.memory_1024 * kSpreadMemory),
                     static_cast<uint32_t>(k.rate.contention_1024 * kSpreadContention)};
    k.gangs = device_plan::larger(1u, workers / groups);
    k.by_gangs = device_plan::reciprocal(k.gangs);
    const uint32_t tile = device_plan::larger(1u, p.tile_ns(workers));
    k.slot_eighths = (8 * p.max_rows() + groups - 1) / groups;
    k.line_lead = device_plan::smaller((p.cost.partial_next * 16 + tile / 2) / tile,
                                       device_plan::kMaxLineLead);
    // Each sends the others their columns and stores its own; a piece stores floats, all of them.
    const uint32_t rows = p.most_group_rows();
    const auto sent = static_cast<int64_t>(uint64_t{p.cost.mates_row_1024} * rows >> 10);
    const auto stored = static_cast<int64_t>(uint64_t{p.cost.store_row_1024} * rows >> 10);
    for (int log2 = 1; log2 < 4; ++log2) {
        const int64_t more = p.cost.mates_fixed + sent - (sent >> log2) + (stored >> log2);
        k.mates[log2] = static_cast<uint32_t>(device_plan::larger(more - 2 * stored, int64_t{0}));
    }
    k.margin = (p.cost.dependency + p.cost.reduction_fixed + tile / 2) / tile;
    for (k.top_step = 1; 2 * int64_t{k.top_step} < p.num_sequences(); k.top_step *= 2) {
    }
    return p;
}

// Shared memory that the planning CTA may take. A larger state lies behind the instructions.
inline constexpr int64_t kDevicePlanSmemBytes = 160 * 1024;

enum DevicePlanHeader {  // int32 words of the header
    kHeaderInstructions = 0,
    kHeaderSlots,
    kHeaderBadLengths,
    kHeaderBadRequest,  // the first of them
    kHeaderBadLength,
    kDevicePlanHeaderWords = 8,
};

}  // namespace mla
