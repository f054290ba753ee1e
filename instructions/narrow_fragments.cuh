// Fragments of a partial of few rows, and the tensor-core products on them. KV
// positions, then latent columns, are the wgmma's M; rows are its N. So the products
// take what the rows need, not what 64 rows would.
//
//     S^T [64 positions, 32 rows]     = K [64, 576] Q^T
//     O^T [64 latent columns, 32 rows] += V^T [64, 64 positions] P^T, for eight blocks of columns
//
// A thread holds the rows 8 j + 2 (lane % 4) + c, j < 4, c < 2, the same ones in S^T and in O^T; of
// the M dimension it holds `lane / 4` of its warp's sixteen, and the one eight below.
#pragma once

#include "instructions/fragments.cuh"

namespace mla {

using NarrowScores = kittens::rt_fl<16, kNarrowRows>;
using NarrowBlock = kittens::rt_fl<16, kNarrowRows>;
// P [rows, positions] of one tile.
template <class Element>
using NarrowPTile = kittens::st<Element, kNarrowRows, kKvTile>;

// Of a thread's rows: r = 2 j + c.
inline constexpr int kThreadRows = kNarrowRows / 4;
__device__ __forceinline__ int thread_row(int r) {
    return r / 2 * 8 + mk::ptx::thread_in_cta() % 4 * 2 + r % 2;
}
// Upper (0) or lower (1) element of a thread's row.
template <class Fragment>
__device__ __forceinline__ auto& element(Fragment& f, int r, int lower) {
    float2& pair = f.tiles[0][r / 4].data[r / 2 % 2 * 2 + lower];
    return r % 2 == 0 ? pair.x : pair.y;
}

// The latent columns of the output, as blocks of 64 in the order in which a warpgroup takes them:
// first the half that it will write.
struct NarrowOutput {
    NarrowBlock block[kLatentBlocks];
};

// Q in shared memory: swizzle blocks of `box_rows` rows one behind the other, the rope's last.
class NarrowQ {
  public:
    __device__ NarrowQ(uint32_t address, int box_rows)
        : low_((__shfl_sync(~0u, address, 0) & kCtaAddress) >> 4 | 1 << 16),
          block_(__shfl_sync(~0u, box_rows, 0) * kBlockRowBytes >> 4) {}

    // The 16-deep slice `step` of the 36 of the width.
    __device__ uint64_t slice(int step) const {
        constexpr uint32_t kHigh = 8 * kBlockRowBytes >> 4 | 1 << 30;
        return static_cast<uint64_t>(kHigh) << 32 |
               (low_ + step / kStepsPerBlock * block_ + step % kStepsPerBlock * 2);
    }

  private:
    static constexpr int kStepsPerBlock = kBlockCols / 16;
    uint32_t low_, block_;
};

// Issues s (+)= K Q^T over one half of the width; not yet committed.
template <class Element, bool kFirst>
__device__ __forceinline__ void multiply_scores(NarrowScores& s, const NarrowQ& q, uint32_t k) {
    using Mma = kittens::wgmma::base<float, Element, kNarrowRows, 0, 0>;
    constexpr int kHalf = kFirst ? kLeft : kRight;
    constexpr int kLatentSteps = kHalfLatent / 16, kRopeSteps = kHalfRope / 16;
    const KOperand k_latent(uniform(latent_address(k)));
    const RopeOperand k_rope(uniform(rope_address(k)));
    begin_products(s);
#pragma unroll
    for (int step = 0; step < kLatentSteps; ++step) {
        Mma::st_st(
            s, k_latent.slice(step), q.slice(kHalf * kLatentSteps + step), !(kFirst && step == 0));
    }
#pragma unroll
    for (int step = 0; step < kRopeSteps; ++step) {
        Mma::st_st(s, k_rope.slice(step), q.slice(2 * kLatentSteps + kHalf * kRopeSteps + step), 1);
    }
}

// Issues o += V^T P^T for the half of the blocks that a page holds; not yet committed.
template <class Element, int kFirstBlock>
__device__ __forceinline__ void accumulate(NarrowOutput& o,
                                           const NarrowPTile<Element>& p,
                                           uint32_t v) {
    using Mma = kittens::wgmma::base<float, Element, kNarrowRows, 1, 0>;
    const POperand p_positions(uniform(mk::ptx::smem_address(&p)));
    const VOperand v_positions(uniform(latent_address(v)));
#pragma unroll
    for (int block = 0; block < kHalfBlocks; ++block) begin_products(o.block[kFirstBlock + block]);
#pragma unroll
    for (int block = 0; block < kHalfBlocks; ++block) {
#pragma unroll
        for (int step = 0; step < kKvTile / 16; ++step) {
            Mma::st_st(o.block[kFirstBlock + block],
                       v_positions.slice(step, block),
                       p_positions.slice(step),
                       1);
        }
    }
}

}  // namespace mla
