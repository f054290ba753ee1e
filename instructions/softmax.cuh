// Online softmax on one warpgroup's fragments. No synchronisation between
// warpgroups here.
#pragma once

#include <cfloat>

#include "instructions/fragments.cuh"

namespace mla {

// Of the columns that this thread holds of every row, those before `end`: a bit for each.
__device__ __forceinline__ uint32_t columns_before(int end) {
    const int first = 2 * (mk::ptx::thread_in_cta() % 4);
    end = min(max(end, 0), kKvTile);
    return (1u << (end / 8 * 2 + min(max(end % 8 - first, 0), 2))) - 1;
}

// Scores outside the columns [first, end) become -inf; `end` of the upper row and the lower one.
__device__ __forceinline__ void hide_outside(Scores& s, int first, const int (&end)[2]) {
    const uint32_t before = columns_before(first);
    const uint32_t hidden[2] = {~columns_before(end[0]) | before, ~columns_before(end[1]) | before};
#pragma unroll
    for (int tile = 0; tile < Scores::width; ++tile) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const int column = 4 * tile + part / 2 * 2;
            float2& pair = s.tiles[0][tile].data[part];
            if (hidden[part % 2] & 1u << column) pair.x = -INFINITY;
            if (hidden[part % 2] & 2u << column) pair.y = -INFINITY;
        }
    }
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// What a move of the running maximum does to everything summed so far.
struct RowScale {
    float factor[2];

    __device__ __forceinline__ void apply(Accumulator& o) const {
        if (__all_sync(~0u, factor[0] == 1.f && factor[1] == 1.f)) return;
#pragma unroll
        for (int tile = 0; tile < Accumulator::width; ++tile) {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                float2& pair = o.tiles[0][tile].data[part];
                pair.x *= factor[part % 2];
                pair.y *= factor[part % 2];
            }
        }
    }
};

// Running maximum, in units of log2, and sum of this thread's two rows. All four threads of a
// quad hold the same maximum; each sums its own columns until the end.
struct RowState {
    static constexpr int kSlack = 8;
    static constexpr float kMost = 1 << kSlack;

    // Of a row that has seen no key yet: below any score, but what is hidden, -inf, still lies
    // below it.
    static constexpr float kNoMax = -FLT_MAX;

    float max[2] = {kNoMax, kNoMax};
    float sum[2] = {0.f, 0.f};

    __device__ __forceinline__ RowScale move_max(const float (&to)[2]) {
        RowScale scale;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            scale.factor[i] = mk::ptx::exp2_approx(max[i] - to[i]);
            if (max[i] == kNoMax) scale.factor[i] = 1.f;  // nothing summed yet
            max[i] = to[i];
            sum[i] *= scale.factor[i];
        }
        return scale;
    }

    // Turns scores into P, relative to the running maximum. That stays where it is until what this
    // thread's columns add to a row's sum exceeds 2^kSlack: no P is more than that then, exact all
    // the same in a format with an exponent, and most tiles need no rescaling of O at all. So P is
    // computed before it is known whether this is such a tile.
    template <class Element>
    __device__ __forceinline__ void absorb(const Scores& s,
                                           PFragment<Element>& p,
                                           Accumulator& o,
                                           float scale_log2) {
        float added[2];
        weigh(s, p, scale_log2, added);
        bool exceeded = false;
        for (int i = 0; i < 2; ++i) exceeded |= added[i] > kMost;
        if (__any_sync(~0u, exceeded)) {
            float to[2];
            max_with(s, scale_log2, to);
            move_max(to).apply(o);
            weigh(s, p, scale_log2, added);
        }
        for (int i = 0; i < 2; ++i) sum[i] += added[i];
    }

    // The running maximum once these scores are among those that have been seen.
    __device__ __forceinline__ void max_with(const Scores& s,
                                             float scale_log2,
                                             float (&to)[2]) const {
        float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int tile = 0; tile < Scores::width; ++tile) {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                const float2 pair = s.tiles[0][tile].data[part];
                top[part % 2] = fmaxf(top[part % 2], fmaxf(pair.x, pair.y));
            }
        }
        for (int i = 0; i < 2; ++i) to[i] = fmaxf(quad_max(top[i]) * scale_log2, max[i]);
    }

    // P, and what this thread's columns add to the sums.
    template <class Element>
    __device__ __forceinline__ void weigh(const Scores& s,
                                          PFragment<Element>& p,
                                          float scale_log2,
                                          float (&added)[2]) const {
        added[0] = added[1] = 0.f;
#pragma unroll
        for (int tile = 0; tile < Scores::width; ++tile) {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                const float2 pair = s.tiles[0][tile].data[part];
                const float2 e = {mk::ptx::exp2_approx(fmaf(pair.x, scale_log2, -max[part % 2])),
                                  mk::ptx::exp2_approx(fmaf(pair.y, scale_log2, -max[part % 2]))};
                added[part % 2] += e.x + e.y;
                *reinterpret_cast<uint32_t*>(&p.tiles[0][tile].data[part]) =
                    round_pair(e, Element{});
            }
        }
    }

    // Sums of whole rows, in all threads that hold one.
    __device__ __forceinline__ void sum_up() {
        for (float& own : sum) own = quad_sum(own);
    }

    // What the output is multiplied with in the end; sinks are logits in base 2 that take their
    // share of the weight. A row that saw no key has no output: 0.
    __device__ __forceinline__ RowScale inverse_sum(const float (&sink_log2)[2]) const {
        RowScale inverse;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float total = sum[i] + mk::ptx::exp2_approx(sink_log2[i] - max[i]);
            inverse.factor[i] = sum[i] > 0.f ? mk::ptx::reciprocal_approx(total) : 0.f;
        }
        return inverse;
    }

    __device__ __forceinline__ float lse_log2(int i) const {
        return sum[i] > 0.f ? max[i] + __log2f(sum[i]) : -INFINITY;
    }
};

}  // namespace mla
