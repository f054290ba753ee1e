// Fragments of a partial of few rows, and the tensor-core products on them. KV
// positions, then latent columns, are the wgmma's M; rows are its N, 16 or 32. So the products
// take what the rows need, not what 64 rows would.
//
//     S^T [64 positions, rows]      = K [64, 576] Q^T
//     O^T [64 latent columns, rows] += V^T [64, 64 positions] P^T, for four blocks of columns
//
// A thread holds the rows 8 j + 2 (lane % 4) + c, c < 2, the same ones in S^T and in O^T; of the M
// dimension it holds `lane / 4` of its warp's sixteen, and the one eight below.
#pragma once

#include "instructions/fragments.cuh"

namespace mla {

template <int kRows>
using NarrowScores = kittens::rt_fl<16, kRows>;
template <int kRows>
using NarrowBlock = kittens::rt_fl<16, kRows>;
// P [rows, positions] of one tile.
template <class Element, int kRows>
using NarrowPTile = kittens::st<Element, kRows, kKvTile>;

// Of a thread's rows, a quarter of all: r = 2 j + c.
__device__ __forceinline__ int thread_row(int r) {
    return r / 2 * 8 + mk::ptx::thread_in_cta() % 4 * 2 + r % 2;
}
// Upper (0) or lower (1) element of a thread's row.
template <class Fragment>
__device__ __forceinline__ auto& element(Fragment& f, int r, int lower) {
    float2& pair = f.tiles[0][r / 4].data[r / 2 % 2 * 2 + lower];
    return r % 2 == 0 ? pair.x : pair.y;
}

// Half the latent columns of the output, as blocks of 64.
template <int kRows>
struct NarrowOutput {
    NarrowBlock<kRows> block[kHalfBlocks];
};

// Half the width of Q, in shared memory: swizzle blocks of `box_rows` rows one behind the other,
// the rope's last.
class NarrowHalfQ {
  public:
    __device__ NarrowHalfQ(uint32_t address, int box_rows, int half)
        : block_(uniform(box_rows * kBlockRowBytes >> 4)),
          low_(uniform((address & kCtaAddress) >> 4 | 1 << 16) + half * kHalfBlocks * block_),
          rope_(uniform((address & kCtaAddress) >> 4 | 1 << 16) + kLatentBlocks * block_ +
                half * (kHalfRope * kElementBytes >> 4)) {}

    // The 16-deep slice `step` of the latent columns, or of the rope's.
    __device__ uint64_t latent(int step) const {
        return descriptor(low_ + step / kStepsPerBlock * block_ + step % kStepsPerBlock * 2);
    }
    __device__ uint64_t rope(int step) const { return descriptor(rope_ + step * 2); }

  private:
    static constexpr int kStepsPerBlock = kBlockCols / 16;
    uint32_t block_, low_, rope_;

    __device__ static uint64_t descriptor(uint32_t low) {
        constexpr uint32_t kHigh = kGroupBytes >> 4 | 1 << 30;
        return static_cast<uint64_t>(kHigh) << 32 | low;
    }
};

// Issues s (+)= K Q^T over one half of the width; not yet committed.
template <class Element, bool kFirst, int kRows>
__device__ __forceinline__ void multiply_scores(NarrowScores<kRows>& s,
                                                const NarrowHalfQ& q,
                                                const HalfK& k) {
    using Mma = kittens::wgmma::base<float, Element, kRows, 0, 0>;
    begin_products(s);
#pragma unroll
    for (int step = 0; step < kHalfLatent / 16; ++step) {
        Mma::st_st(s, k.latent.slice(step), q.latent(step), !(kFirst && step == 0));
    }
#pragma unroll
    for (int step = 0; step < kHalfRope / 16; ++step) {
        Mma::st_st(s, k.rope.slice(step), q.rope(step), 1);
    }
}

// Issues o += V^T P^T for half the latent columns.
template <class Element, int kRows>
__device__ __forceinline__ void accumulate(NarrowOutput<kRows>& o,
                                           const POperand& p,
                                           const VOperand& v) {
    using Mma = kittens::wgmma::base<float, Element, kRows, 1, 0>;
#pragma unroll
    for (NarrowBlock<kRows>& block : o.block) begin_products(block);
#pragma unroll
    for (int block = 0; block < kHalfBlocks; ++block) {
#pragma unroll
        for (int step = 0; step < kKvTile / 16; ++step) {
            Mma::st_st(o.block[block], v.slice(step, block), p.slice(step), 1);
        }
    }
    kittens::warpgroup::mma_commit_group();
}

}  // namespace mla
