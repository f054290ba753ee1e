// Fragments of an MLA partial, and the tensor-core products on them.
//
// Fragments are wgmma's: a thread holds two rows of a 64-row tile, `lane / 4` of
// its warp's sixteen and the one eight below, and in each the column pairs
// 8 j + 2 (lane % 4).
#pragma once

#include "instructions/mla_globals.cuh"

namespace mla {

using Scores = kittens::rt_fl<16, kKvTile>;
using Accumulator = kittens::rt_fl<16, kHalfLatent>;  // half the latent columns
template <class Element>
using PFragment = kittens::rt<Element, 16, kKvTile, kittens::ducks::rt_layout::row>;
template <class Element>
using PTile = kittens::st<Element, kMaxRows, kKvTile>;

__device__ __forceinline__ int fragment_row() {
    const int thread = mk::ptx::thread_in_cta();
    return thread % kWarpgroupThreads / mk::kWarpThreads * 16 + thread % mk::kWarpThreads / 4;
}

// What is the same in all lanes, known to be.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }

// A wgmma operand in shared memory: groups of eight rows, kGroupStep bytes apart, of swizzle blocks
// kBlockStep bytes apart. Not transposed, the dimension that is summed over lies along a row;
// transposed, it goes through the rows. ThunderKittens' descriptors are 64-bit sums in vector
// registers, a dozen instructions per product where a product of 64 x 64 x 16 takes 32 cycles
// (H200: 50 measured). Here the address is uniform, see below, and only the low word moves.
// Fields: PTX ISA, "Matrix descriptor format".
// (Above the bits of an address stands which CTA of the cluster it is in; the field for it is
// short.)
inline constexpr uint32_t kCtaAddress = (1 << 18) - 1;
template <int kSwizzleBytes, int kGroupStep, int kBlockStep, bool kTransposed>
class Operand {
  public:
    __device__ explicit Operand(uint32_t address)
        : low_((address & kCtaAddress) >> 4 | kLeadingBytes >> 4 << 16) {}

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

// Half of Q's rope columns, in registers: with all of Q and K in shared memory a product takes as
// long as the tensor cores do only while nobody else reads there.
template <class Element>
struct RopeInRegisters {
    kittens::rt<Element, 16, kHalfRope> rope;

    __device__ explicit RopeInRegisters(uint32_t address) {
        const int lane = mk::ptx::thread_in_cta() % mk::kWarpThreads;
        const int row = fragment_row() / 16 * 16 + lane % 16;
#pragma unroll
        for (int step = 0; step < kHalfRope / 16; ++step) {
            const int chunk = (2 * step + lane / 16) ^ row / 2 % 4;
            mk::ptx::load_matrices(address + row * kRopeRowBytes + chunk * 16,
                                   reinterpret_cast<uint32_t (&)[4]>(rope.tiles[0][step].data));
        }
    }
    template <class Mma>
    __device__ __forceinline__ void multiply(Scores& s, int step, uint64_t k) const {
        Mma::rt_st(s, rope.tiles[0][step], k, 1);
    }
};
// The same where it lies.
struct RopeInSmem {
    RopeOperand rope;

    __device__ explicit RopeInSmem(uint32_t address) : rope(address) {}
    template <class Mma>
    __device__ __forceinline__ void multiply(Scores& s, int step, uint64_t k) const {
        Mma::st_st(s, rope.slice(step), k, 1);
    }
};

// Half the width of Q, and of K.
template <class Rope>
struct HalfQ {
    QOperand latent;
    Rope rope;
    __device__ explicit HalfQ(uint32_t page)
        : latent(latent_address(page)), rope(rope_address(page)) {}
};
struct HalfK {
    KOperand latent;
    RopeOperand rope;
    __device__ explicit HalfK(uint32_t page)
        : latent(latent_address(page)), rope(rope_address(page)) {}
};

// Issues s (+)= Q K^T over one half of the width; not yet committed.
template <class Element, bool kFirst, class Rope>
__device__ __forceinline__ void multiply_scores(Scores& s, const HalfQ<Rope>& q, const HalfK& k) {
    using Mma = kittens::wgmma::base<float, Element, kKvTile, 0, 0>;
    begin_products(s);
#pragma unroll
    for (int step = 0; step < kHalfLatent / 16; ++step) {
        Mma::st_st(s, q.latent.slice(step), k.latent.slice(step), !(kFirst && step == 0));
    }
#pragma unroll
    for (int step = 0; step < kHalfRope / 16; ++step) {
        q.rope.template multiply<Mma>(s, step, k.rope.slice(step));
    }
}

// Issues o += P V, with P in shared memory.
template <class Element>
__device__ __forceinline__ void accumulate(Accumulator& o, const POperand& p, const VOperand& v) {
    using Mma = kittens::wgmma::base<float, Element, kHalfLatent, 0, 1>;
    begin_products(o);
#pragma unroll
    for (int step = 0; step < kKvTile / 16; ++step) {
        Mma::st_st(o, p.slice(step), v.slice(step), 1);
    }
    kittens::warpgroup::mma_commit_group();
}

// The same, with P in registers.
template <class Element>
__device__ __forceinline__ void accumulate(Accumulator& o,
                                           const PFragment<Element>& p,
                                           const VOperand& v) {
    using Mma = kittens::wgmma::base<float, Element, kHalfLatent, 0, 1>;
    begin_products(o);
#pragma unroll
    for (int step = 0; step < kKvTile / 16; ++step) {
        Mma::rt_st(o, p.tiles[0][step], v.slice(step), 1);
    }
    kittens::warpgroup::mma_commit_group();
}

}  // namespace mla
