// What the MLA opcodes read besides their words: tensors, their shapes, and the
// tile types that both the copy engine and the tensor cores agree on.
#pragma once

#include "instructions/layout.h"
#include "kittens.cuh"
#include "megakernel/args.h"
#include "megakernel/config.cuh"
#include "megakernel/ptx.cuh"

namespace mla {

using kittens::bf16;

static_assert(kInstructionWords == mk::kInstructionWords);

// A page holds half the width of a 64-row tile of Q or of KV: 256 latent columns, as four
// 64-column blocks swizzled over 128 bytes, and 32 rope columns, swizzled over 64 bytes. So both
// halves hold whole wgmma operands, and each consumer warpgroup can own the half whose latent
// columns it accumulates into the output.
inline constexpr int kHalfLatent = kLatentDim / 2;
inline constexpr int kHalfRope = kRopeDim / 2;
inline constexpr int kBlockCols = 64;  // columns of a 128-byte swizzle block, bf16
inline constexpr int kLatentBlocks = kLatentDim / kBlockCols;
inline constexpr int kHalfBlocks = kHalfLatent / kBlockCols;

using LatentHalf = kittens::st_bf<kKvTile, kHalfLatent>;
using RopeHalf = kittens::st_bf<kKvTile, kHalfRope>;
struct HalfTile {
    LatentHalf latent;
    RopeHalf rope;
};
static_assert(kMaxRows == kKvTile, "Q and KV tiles share HalfTile");
static_assert(sizeof(HalfTile) == 36 * 1024);

// Which warpgroup, and which half of the latent columns.
enum Half { kLeft = 0, kRight = 1 };

struct MlaGlobals {
    // Q [batch, s_q * heads, width]: boxes of row_group rows x one swizzle block.
    CUtensorMap q_latent;
    CUtensorMap q_rope;
    // KV [kv_blocks, block_size, width]: boxes of one half tile, latent and rope apart.
    CUtensorMap kv_latent;
    CUtensorMap kv_rope;
    // Where staged output goes: O bf16 [batch, s_q * heads, 512], scratch fp32 [slots, s_q * heads,
    // 512].
    CUtensorMap o;
    CUtensorMap o_scratch_map;

    mk::MegakernelArgs megakernel;

    const int32_t* block_table;  // [batch, table_stride]
    bf16* o_ptr;
    float* o_scratch;         // [slots, s_q, heads, 512]
    float* lse_log2_scratch;  // [slots, s_q, heads]
    int32_t* done_flags;      // [slots, s_q]
    float* lse;               // natural log, may be null
    int64_t lse_batch_stride;
    int64_t lse_head_stride;
    int64_t lse_token_stride;

    uint64_t kv_policy;  // L2 eviction: one row group reads its KV once, several share it

    int32_t table_stride;
    int32_t block_size;  // KV positions per block of the cache; a multiple of kKvTile
    int32_t s_q;
    int32_t num_heads;
    int32_t row_group;  // rows per partial: min(kMaxRows, s_q * num_heads)
    float scale_log2;   // softmax_scale * log2(e)

    __device__ void prefetch() const {
        mk::ptx::prefetch_tensor_map(q_latent);
        mk::ptx::prefetch_tensor_map(q_rope);
        mk::ptx::prefetch_tensor_map(kv_latent);
        mk::ptx::prefetch_tensor_map(kv_rope);
        mk::ptx::prefetch_tensor_map(o);
        mk::ptx::prefetch_tensor_map(o_scratch_map);
    }

    __device__ int32_t* done_flag(int slot, int token) const {
        return done_flags + static_cast<int64_t>(slot) * s_q + token;
    }
    // First (token, head) row of a slot or request, counted in rows of the whole tensor.
    __device__ int64_t first_row(int slot_or_batch) const {
        return static_cast<int64_t>(slot_or_batch) * s_q * num_heads;
    }
    __device__ void store_lse(int batch, int token, int head, float lse_log2) const {
        if (lse == nullptr) return;
        constexpr float kLn2 = 0.693147180559945f;
        // A row that sees no key: +inf, as FlashMLA has it.
        const float value = lse_log2 == -INFINITY ? INFINITY : lse_log2 * kLn2;
        lse[batch * lse_batch_stride + head * lse_head_stride + token * lse_token_stride] = value;
    }
};

// A negative destination is a scratch slot.
__device__ __forceinline__ bool writes_scratch(int dst_batch) { return dst_batch < 0; }
__device__ __forceinline__ int scratch_slot(int dst_batch) { return -dst_batch - 1; }

// Named barriers (bar.sync ids; 0 is __syncthreads). Named for what is true after the wait.
enum class NamedBarrier : int {
    kWarpgroupSynced = 1,  // + Half: the 128 threads of one warpgroup
    kConsumersSynced = 3,
    kEvenScored = 4,  // even tile: Q K^T is through the tensor cores
    kEvenPReady = 5,  // even tile: P and the row maxima are in scratch
    kOddScored = 6,   // odd tile: Q K^T is through the tensor cores
    kOddPReady = 7,   // odd tile: P and maxima, and nobody reads the even tile's P any more
};
inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kConsumerThreads = 2 * kWarpgroupThreads;

__device__ __forceinline__ void barrier_sync(NamedBarrier barrier, int threads) {
    mk::ptx::named_barrier_sync(static_cast<int>(barrier), threads);
}
__device__ __forceinline__ void barrier_arrive(NamedBarrier barrier, int threads) {
    mk::ptx::named_barrier_arrive(static_cast<int>(barrier), threads);
}
template <Half kHalf>
__device__ __forceinline__ void warpgroup_sync() {
    mk::ptx::named_barrier_sync(static_cast<int>(NamedBarrier::kWarpgroupSynced) + kHalf,
                                kWarpgroupThreads);
}

}  // namespace mla
