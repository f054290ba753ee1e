// What a device plan is made from, and how large it can become.
#pragma once

#include <cstdint>
#include <type_traits>

#include "instructions/layout.h"

#ifdef __CUDACC__
#define MLA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MLA_HOST_DEVICE inline
#endif

namespace mla {

namespace device_plan {

inline constexpr int kFillSequences = 16;  // that one fill may cover
inline constexpr int kFillTokens = 64;     // of padding
inline constexpr int kMinTiles = 2;        // of a piece of a sequence that the line cuts
inline constexpr int kCandidates = 32;     // piece lengths to choose from
inline constexpr int kInvariantRows = 2;   // of a reduction in a batch-invariant plan

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

}  // namespace device_plan

// The constants of a CostModel, in nanoseconds; those that are multiplied with many in picoseconds.
struct DevicePlanCost {
    int64_t launch, partial_fixed, partial_next, tile_compute, reduction_fixed, dependency;
    int64_t store_kib, tile, tile_contention, reduction_kib;  // ps
};

struct DevicePlanProblem {
    const int32_t* seq_lens;      // [num_requests]
    const int32_t* cu_seqlens_q;  // [num_requests + 1], or null: s_q tokens each
    int num_requests;
    int num_kv_heads;
    int s_q;           // the most new tokens of a request
    int total_tokens;  // of one KV head
    int num_heads;     // query heads per KV head
    int max_seq_len;
    int num_workers;
    int split_tiles;  // > 0: every sequence is cut so, whatever else is in the batch
    DevicePlanCost cost;

    MLA_HOST_DEVICE int num_sequences() const { return num_requests * num_kv_heads; }
    MLA_HOST_DEVICE int max_rows() const { return s_q * num_heads; }
};

// What any batch of these sizes can need.
struct DevicePlanCapacity {
    int64_t instructions;  // end marks included
    int64_t slots;
    int64_t pieces;
};
MLA_HOST_DEVICE DevicePlanCapacity device_plan_capacity(const DevicePlanProblem& p) {
    using device_plan::ceil_div;
    const int64_t sequences = p.num_sequences();
    const int64_t groups = ceil_div(p.max_rows(), kMaxRows);
    DevicePlanCapacity capacity{};
    int64_t reductions;
    if (p.split_tiles > 0) {
        const int tiles = ceil_div(p.max_seq_len, kKvTile);
        capacity.pieces = sequences * device_plan::larger(1, ceil_div(tiles, p.split_tiles));
        capacity.slots = capacity.pieces * groups;
        reductions =
            sequences * groups *
            ceil_div(device_plan::smaller(kMaxRows, p.max_rows()), device_plan::kInvariantRows);
    } else {
        // A line is cut once for each worker; even pieces are at most two for each.
        capacity.pieces = sequences + 2 * p.num_workers;
        capacity.slots = 2 * int64_t{p.num_workers} + groups;
        reductions = 4 * int64_t{p.num_workers};
    }
    const int64_t fills = sequences + int64_t{p.num_kv_heads} *
                                          (1 + ceil_div(p.total_tokens, device_plan::kFillTokens));
    capacity.instructions = capacity.pieces * groups + reductions + fills + p.num_workers;
    return capacity;
}

// Shared memory that the planning CTA may take. A larger state lies behind the instructions.
inline constexpr int64_t kDevicePlanSmemBytes = 200 * 1024;

enum DevicePlanHeader {  // int32 words of the header
    kHeaderInstructions = 0,
    kHeaderSlots,
    kHeaderBadLengths,
    kHeaderBadRequest,  // the first that was found
    kHeaderBadLength,
    kDevicePlanHeaderWords = 8,
};

}  // namespace mla
