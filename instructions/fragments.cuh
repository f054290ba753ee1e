// Fragments of an MLA partial, and the tensor-core products on them.
//
// Fragments are wgmma's: a thread holds two rows of a 64-row tile, `lane / 4` of
// its warp's sixteen and the one eight below, and in each the column pairs
// 8 j + 2 (lane % 4).
#pragma once

#include "instructions/mla_globals.cuh"

namespace mla {

using Scores = kittens::rt_fl<16, kKvTile>;
// Half the latent columns, in two parts: ptxas compiles no product 256 columns wide for a kernel
// that is launched with 128 registers a thread, whatever setmaxnreg adds to them.
struct Accumulator {
    static constexpr int kParts = 2;
    static constexpr int kPartCols = kHalfLatent / kParts;
    kittens::rt_fl<16, kPartCols> part[kParts];

    static constexpr int width = kHalfLatent / 16;
    __device__ __forceinline__ auto& tile(int i) {
        return part[i / (width / kParts)].tiles[0][i % (width / kParts)];
    }
    __device__ __forceinline__ const auto& tile(int i) const {
        return part[i / (width / kParts)].tiles[0][i % (width / kParts)];
    }
};
template <class Element>
using PFragment = kittens::rt<Element, 16, kKvTile, kittens::ducks::rt_layout::row>;
template <class Element>
using PTile = kittens::st<Element, kMaxRows, kKvTile>;

__device__ __forceinline__ int fragment_row() {
    const int thread = mk::ptx::thread_in_cta();
    return thread % kWarpgroupThreads / mk::kWarpThreads * 16 + thread % mk::kWarpThreads / 4;
}

// A wgmma operand in shared memory: groups of eight rows, kGroupStep bytes apart, of swizzle blocks
// kBlockStep bytes apart. Not transposed, the dimension that is summed over lies along a row;
// transposed, it goes through the rows. ThunderKittens' descriptors are 64-bit sums in vector
// registers, a dozen instructions per product where a product of 64 x 64 x 16 takes 32 cycles
// (H200: 50 measured). Here the address is uniform by construction and only the low word moves.
// Fields: PTX ISA, "Matrix descriptor format".
template <int kSwizzleBytes, int kGroupStep, int kBlockStep, bool kTransposed>
class Operand {
  public:
    __device__ explicit Operand(uint32_t address)
        : low_(__shfl_sync(~0u, address, 0) >> 4 | kLeadingBytes >> 4 << 16) {}

    // The 16-deep slice `step` of the dimension that is summed over; transposed operands begin with
    // swizzle block `block` of the other dimension.
    __device__ uint64_t slice(int step, int block = 0) const {
        const int bytes = kTransposed
                              ? block * kBlockStep + step * (16 / kGroupRows) * kGroupStep
                              : step / kStepsPerBlock * kBlockStep + step % kStepsPerBlock * 32;
        return static_cast<uint64_t>(kHigh) << 32 | (low_ + (bytes >> 4));
    }

  private:
    static constexpr int kStepsPerBlock = kSwizzleBytes / 32;
    // Between swizzle blocks side by side; read for transposed operands only.
    static constexpr uint32_t kLeadingBytes = kTransposed ? kBlockStep : 16;
    static constexpr uint32_t kSwizzleMode = kSwizzleBytes == 128 ? 1 : 2;
    static constexpr uint32_t kHigh = kGroupStep >> 4 | kSwizzleMode << 30;
    static_assert(kSwizzleBytes == 128 || kSwizzleBytes == 64);

    uint32_t low_;
};
using KOperand = Operand<kBlockRowBytes, kKvGroupBytes, kGroupBytes, false>;
using VOperand = Operand<kBlockRowBytes, kKvGroupBytes, kGroupBytes, true>;
using QOperand = Operand<kBlockRowBytes, kGroupBytes, kMaxRows * kBlockRowBytes, false>;
using RopeOperand = Operand<kRopeRowBytes, kGroupRows * kRopeRowBytes, 0, false>;
// One tile's P is one swizzle block wide.
using POperand = Operand<kBlockRowBytes, kGroupBytes, 0, false>;

// What came before in these registers is done before the products that follow. (Shared memory
// written by ordinary stores has been fenced by its writers.)
template <class Fragment>
__device__ __forceinline__ void begin_products(Fragment& d) {
#pragma unroll
    for (int tile = 0; tile < Fragment::width; ++tile) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            asm volatile("" : "+f"(d.tiles[0][tile].data[part].x)::"memory");
            asm volatile("" : "+f"(d.tiles[0][tile].data[part].y)::"memory");
        }
    }
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Shared-memory addresses of what a page holds.
__device__ __forceinline__ uint32_t latent_address(uint32_t page) { return page; }
__device__ __forceinline__ uint32_t rope_address(uint32_t page) { return page + kHalfLatentBytes; }

// Half the width of Q or K, in a page.
template <class Latent>
struct HalfOperand {
    Latent latent;
    RopeOperand rope;
    __device__ explicit HalfOperand(uint32_t page)
        : latent(latent_address(page)), rope(rope_address(page)) {}
};
using HalfQ = HalfOperand<QOperand>;
using HalfK = HalfOperand<KOperand>;

// Issues s (+)= Q K^T over one half of the width; not yet committed.
template <class Element, bool kFirst>
__device__ __forceinline__ void multiply_scores(Scores& s, const HalfQ& q, const HalfK& k) {
    using Mma = kittens::wgmma::base<float, Element, kKvTile, 0, 0>;
    begin_products(s);
#pragma unroll
    for (int step = 0; step < kHalfLatent / 16; ++step) {
        Mma::st_st(s, q.latent.slice(step), k.latent.slice(step), !(kFirst && step == 0));
    }
#pragma unroll
    for (int step = 0; step < kHalfRope / 16; ++step) {
        Mma::st_st(s, q.rope.slice(step), k.rope.slice(step), 1);
    }
}

// Issues o += P V.
template <class Element>
__device__ __forceinline__ void accumulate(Accumulator& o, const POperand& p, const VOperand& v) {
    using Mma = kittens::wgmma::base<float, Element, Accumulator::kPartCols, 0, 1>;
#pragma unroll
    for (auto& part : o.part) begin_products(part);
#pragma unroll
    for (int part = 0; part < Accumulator::kParts; ++part) {
#pragma unroll
        for (int step = 0; step < kKvTile / 16; ++step) {
            const int block = part * Accumulator::kPartCols / kBlockCols;
            Mma::st_st(o.part[part], p.slice(step), v.slice(step, block), 1);
        }
    }
    kittens::warpgroup::mma_commit_group();
}

}  // namespace mla
