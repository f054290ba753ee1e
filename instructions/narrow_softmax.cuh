// Online softmax of a partial of few rows. Positions lie across a warpgroup's
// threads, so maxima and sums of a row are found together: by votes and through shared memory.
#pragma once

#include <climits>

#include "instructions/narrow_fragments.cuh"
#include "instructions/softmax.cuh"

namespace mla {

// What the four warps of a warpgroup tell each other of every row. (As many as a warp has lanes.)
struct NarrowExchange {
    float of_warp[4][kNarrowRows];
};

// Of a thread's rows: one float each.
template <int kRows>
struct NarrowRow {
    float of[kRows / 4];
};

// What lies there for a thread's rows.
template <int kRows>
__device__ __forceinline__ NarrowRow<kRows> rows_of(const float (&from)[kNarrowRows]) {
    NarrowRow<kRows> row;
#pragma unroll
    for (int r = 0; r < kRows / 4; r += 2) {
        const auto pair = *reinterpret_cast<const float2*>(&from[thread_row(r)]);
        row.of[r] = pair.x;
        row.of[r + 1] = pair.y;
    }
    return row;
}

// What the lanes have, each of the row of its number, for a thread's rows.
template <int kRows>
__device__ __forceinline__ NarrowRow<kRows> rows_of_lanes(float own) {
    NarrowRow<kRows> row;
#pragma unroll
    for (int r = 0; r < kRows / 4; ++r) row.of[r] = __shfl_sync(~0u, own, thread_row(r));
    return row;
}

template <int kRows>
__device__ __forceinline__ void multiply(NarrowOutput<kRows>& o, const NarrowRow<kRows>& factor) {
#pragma unroll
    for (NarrowBlock<kRows>& block : o.block) {
#pragma unroll
        for (int r = 0; r < kRows / 4; ++r) {
            element(block, r, 0) *= factor.of[r];
            element(block, r, 1) *= factor.of[r];
        }
    }
}

// Combines what the lanes that hold the same rows have of them. One row is left to each lane:
// row_of_lane(). At each step a lane keeps half of its rows and gives the others away; of sixteen
// rows each is left to two lanes.
template <int kRows, class Combine>
__device__ __forceinline__ float across_positions(NarrowRow<kRows> x, Combine combine) {
    const int lane = mk::ptx::thread_in_cta() % mk::kWarpThreads;
#pragma unroll
    for (int rows = kRows / 8; rows > 0; rows /= 2) {
        const bool keeps_upper = lane / 4 & rows;
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            const float given = keeps_upper ? x.of[r] : x.of[r + rows];
            const float kept = keeps_upper ? x.of[r + rows] : x.of[r];
            x.of[r] = combine(kept, __shfl_xor_sync(~0u, given, 4 * rows));
        }
    }
    float own = x.of[0];
#pragma unroll
    for (int step = kRows; step < mk::kWarpThreads; step *= 2) {
        own = combine(own, __shfl_xor_sync(~0u, own, step));
    }
    return own;
}
template <int kRows>
__device__ __forceinline__ int row_of_lane() {
    return thread_row(mk::ptx::thread_in_cta() % mk::kWarpThreads / 4 % (kRows / 4));
}
__device__ __forceinline__ int warp_in_warpgroup() {
    return mk::ptx::thread_in_cta() % kWarpgroupThreads / mk::kWarpThreads;
}

// Scores of a tile's rows before `first` become -inf, and those of positions at or past `visible`
// of their row, whatever was read for them. `begin` is the position of row `first`.
template <int kRows>
__device__ __forceinline__ void hide_outside(NarrowScores<kRows>& s,
                                             const int* visible,
                                             int first,
                                             int begin) {
    int position[2];
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
        const int row = fragment_row() + 8 * lower;
        position[lower] = row < first ? INT_MAX : begin - first + row;
    }
#pragma unroll
    for (int r = 0; r < kRows / 4; ++r) {
        const int end = visible[thread_row(r)];
        if (position[0] >= end) element(s, r, 0) = -INFINITY;
        if (position[1] >= end) element(s, r, 1) = -INFINITY;
    }
}

// Running maximum, in units of log2, the same in all threads that hold a row; and the sum over
// this thread's positions.
template <int kRows>
struct NarrowState {
    static constexpr int kThreadRows = kRows / 4;
    using Row = NarrowRow<kRows>;
    using Scores = NarrowScores<kRows>;
    using Output = NarrowOutput<kRows>;

    Row max, sum;

    // Rows past num_rows hold what happened to lie in shared memory: nothing exceeds their maximum.
    __device__ explicit NarrowState(int num_rows) {
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) {
            max.of[r] = first_max(thread_row(r), num_rows);
            sum.of[r] = 0.f;
        }
    }
    __device__ static float first_max(int row, int num_rows) {
        return row < num_rows ? RowState::kNoMax : INFINITY;
    }

    __device__ __forceinline__ bool differs(const Row& others) const {
        bool differs = false;
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) differs |= max.of[r] != others.of[r];
        return differs;
    }

    // Does a score exceed its row's maximum by so much that the maximum has to move? See RowState.
    __device__ __forceinline__ bool is_exceeded(Scores& s, float scale_log2) const {
        bool exceeded = false;
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) {
            const float top = fmaxf(element(s, r, 0), element(s, r, 1));
            exceeded |= top * scale_log2 > max.of[r] + RowState::kSlack;
        }
        return exceeded;
    }

    // Moves the maxima of all rows to what the warpgroup has seen, and tells `maxima`.
    template <class Sync>
    __device__ __forceinline__ void raise_max(Scores& s,
                                              Output& o,
                                              float scale_log2,
                                              NarrowExchange& exchange,
                                              float (&maxima)[kNarrowRows],
                                              bool has_sums,
                                              Sync sync) {
        Row top;
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) {
            top.of[r] = fmaxf(element(s, r, 0), element(s, r, 1));
        }
        const auto larger = [](float x, float y) { return fmaxf(x, y); };
        const int row = row_of_lane<kRows>();
        exchange.of_warp[warp_in_warpgroup()][row] = across_positions(top, larger) * scale_log2;
        sync();
        float to = maxima[row];
#pragma unroll
        for (const auto& of_warp : exchange.of_warp) to = fmaxf(to, of_warp[row]);
        // All four warps do. (Who is late may have read it: larger than what was there, and no more
        // than what all find.)
        maxima[row] = to;
        __syncwarp();
        move_max(rows_of<kRows>(maxima), o, has_sums);
    }

    // Moves the maxima, and with them what has been summed up so far, if anything has.
    __device__ __forceinline__ void move_max(const Row& to, Output& o, bool has_sums) {
        if (has_sums) {
            Row factor;
#pragma unroll
            for (int r = 0; r < kThreadRows; ++r) {
                factor.of[r] = mk::ptx::exp2_approx(max.of[r] - to.of[r]);
                sum.of[r] *= factor.of[r];
            }
            multiply(o, factor);
        }
        max = to;
    }

    // For both warpgroups: the sums of each warp.
    __device__ __forceinline__ void publish_sums(NarrowExchange& sums) const {
        const auto added = [](float x, float y) { return x + y; };
        sums.of_warp[warp_in_warpgroup()][row_of_lane<kRows>()] = across_positions(sum, added);
    }

    // Turns scores into P and writes it, transposed.
    template <class Element>
    __device__ __forceinline__ void weigh(Scores& s,
                                          NarrowPTile<Element, kRows>& p,
                                          float scale_log2) {
        uint32_t packed[kThreadRows];  // [row pair][upper or lower position]
#pragma unroll
        for (int r = 0; r < kThreadRows; r += 2) {
#pragma unroll
            for (int lower = 0; lower < 2; ++lower) {
                float2 e;
                e.x = mk::ptx::exp2_approx(fmaf(element(s, r, lower), scale_log2, -max.of[r]));
                e.y = mk::ptx::exp2_approx(
                    fmaf(element(s, r + 1, lower), scale_log2, -max.of[r + 1]));
                sum.of[r] += e.x;
                sum.of[r + 1] += e.y;
                packed[r + lower] = round_pair(e, Element{});
            }
        }
        // Matrices of a store: two row octets times upper and lower positions. A row of P is 128
        // bytes, eight chunks that are swizzled by the row.
        const int thread = mk::ptx::thread_in_cta() % kWarpgroupThreads;
        const int warp = thread / mk::kWarpThreads, lane = thread % mk::kWarpThreads;
        const int row = lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
        const uint32_t at =
            mk::ptx::smem_address(&p) + row * kBlockRowBytes + (chunk ^ row % 8) * 16;
#pragma unroll
        for (int half = 0; half < kRows / 16; ++half) {
            const uint32_t m[4] = {
                packed[4 * half], packed[4 * half + 1], packed[4 * half + 2], packed[4 * half + 3]};
            mk::ptx::store_matrices_transposed(at + half * 16 * kBlockRowBytes, m);
        }
    }
};

}  // namespace mla
