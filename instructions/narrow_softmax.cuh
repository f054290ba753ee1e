// Online softmax of a partial of few rows. Positions lie across a warpgroup's
// threads, so maxima and sums of a row are found together: by votes and through shared memory.
#pragma once

#include <climits>

#include "instructions/narrow_fragments.cuh"
#include "instructions/softmax.cuh"

namespace mla {

// What the four warps of a warpgroup tell each other of every row.
struct NarrowExchange {
    float of_warp[4][kNarrowRows];
};

// Of a thread's rows: one float each.
struct NarrowRow {
    float of[kThreadRows];
};

// Over the lanes that hold the same rows.
template <class Combine>
__device__ __forceinline__ float across_positions(float x, Combine combine) {
#pragma unroll
    for (int step = 4; step < mk::kWarpThreads; step *= 2) {
        x = combine(x, __shfl_xor_sync(~0u, x, step));
    }
    return x;
}

// Each warp writes one number per row.
__device__ __forceinline__ void publish(float (&to)[kNarrowRows], const NarrowRow& row) {
    if (mk::ptx::thread_in_cta() % mk::kWarpThreads >= 4) return;
#pragma unroll
    for (int r = 0; r < kThreadRows; r += 2) {
        *reinterpret_cast<float2*>(&to[thread_row(r)]) = {row.of[r], row.of[r + 1]};
    }
}
__device__ __forceinline__ int warp_in_warpgroup() {
    return mk::ptx::thread_in_cta() % kWarpgroupThreads / mk::kWarpThreads;
}

// Scores of a tile's rows before `first` become -inf, and those of positions at or past `visible`
// of their row, whatever was read for them. `begin` is the position of row `first`.
__device__ __forceinline__ void hide_outside(NarrowScores& s,
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
    for (int r = 0; r < kThreadRows; ++r) {
        const int end = visible[thread_row(r)];
        if (position[0] >= end) element(s, r, 0) = -INFINITY;
        if (position[1] >= end) element(s, r, 1) = -INFINITY;
    }
}

// Running maximum, in units of log2, the same in all threads that hold a row; and the sum over
// this thread's positions.
struct NarrowState {
    NarrowRow max, sum;

    // Rows past num_rows hold what happened to lie in shared memory: nothing exceeds their maximum.
    __device__ explicit NarrowState(int num_rows) {
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) {
            max.of[r] = thread_row(r) < num_rows ? RowState::kNoMax : INFINITY;
            sum.of[r] = 0.f;
        }
    }

    // Does a score exceed its row's maximum by so much that the maximum has to move? See RowState.
    __device__ __forceinline__ bool is_exceeded(NarrowScores& s, float scale_log2) const {
        bool exceeded = false;
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) {
            const float top = fmaxf(element(s, r, 0), element(s, r, 1));
            exceeded |= top * scale_log2 > max.of[r] + RowState::kSlack;
        }
        return exceeded;
    }

    // Moves the maxima of all rows to what the warpgroup has seen.
    template <class Sync>
    __device__ __forceinline__ void raise_max(
        NarrowScores& s, NarrowOutput& o, float scale_log2, NarrowExchange& exchange, Sync sync) {
        NarrowRow top;
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) {
            top.of[r] = across_positions(fmaxf(element(s, r, 0), element(s, r, 1)),
                                         [](float x, float y) { return fmaxf(x, y); }) *
                        scale_log2;
        }
        publish(exchange.of_warp[warp_in_warpgroup()], top);
        sync();
        NarrowRow factor;
        bool unchanged = true;
#pragma unroll
        for (int r = 0; r < kThreadRows; r += 2) {
            float2 to = {max.of[r], max.of[r + 1]};
#pragma unroll
            for (int warp = 0; warp < 4; ++warp) {
                const auto other =
                    *reinterpret_cast<const float2*>(&exchange.of_warp[warp][thread_row(r)]);
                to = {fmaxf(to.x, other.x), fmaxf(to.y, other.y)};
            }
            factor.of[r] = move_max(r, to.x);
            factor.of[r + 1] = move_max(r + 1, to.y);
            unchanged &= factor.of[r] == 1.f && factor.of[r + 1] == 1.f;
        }
        if (__all_sync(~0u, unchanged)) return;
#pragma unroll
        for (int block = 0; block < kLatentBlocks; ++block) {
#pragma unroll
            for (int r = 0; r < kThreadRows; ++r) {
                element(o.block[block], r, 0) *= factor.of[r];
                element(o.block[block], r, 1) *= factor.of[r];
            }
        }
    }

    // Returns what has been summed so far is to be multiplied with.
    __device__ __forceinline__ float move_max(int r, float to) {
        // Nothing summed yet, or no row at all.
        const bool keeps = max.of[r] == RowState::kNoMax || max.of[r] == to;
        const float factor = keeps ? 1.f : mk::ptx::exp2_approx(max.of[r] - to);
        max.of[r] = to;
        sum.of[r] *= factor;
        return factor;
    }

    // For both warpgroups: the sums of each warp, and the maxima.
    __device__ __forceinline__ void publish_sums(NarrowExchange& sums,
                                                 float (&maxima)[kNarrowRows]) {
#pragma unroll
        for (float& own : sum.of) {
            own = across_positions(own, [](float x, float y) { return x + y; });
        }
        publish(sums.of_warp[warp_in_warpgroup()], sum);
        if (warp_in_warpgroup() == 0) publish(maxima, max);
    }

    // Turns scores into P and writes it, transposed.
    template <class Element>
    __device__ __forceinline__ void weigh(NarrowScores& s,
                                          NarrowPTile<Element>& p,
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
        for (int half = 0; half < kNarrowRows / 16; ++half) {
            const uint32_t m[4] = {
                packed[4 * half], packed[4 * half + 1], packed[4 * half + 2], packed[4 * half + 3]};
            mk::ptx::store_matrices_transposed(at + half * 16 * kBlockRowBytes, m);
        }
    }
};

}  // namespace mla
