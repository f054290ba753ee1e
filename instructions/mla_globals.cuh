// What the MLA opcodes read besides their words: tensors, their shapes, and the
// tile types that both the copy engine and the tensor cores agree on.
#pragma once

#include "instructions/divisor.h"
#include "instructions/layout.h"
#include "instructions/stamp.cuh"
#include "kittens.cuh"
#include "megakernel/args.h"
#include "megakernel/config.cuh"
#include "megakernel/ptx.cuh"

namespace mla {

static_assert(kInstructionWords == mk::kInstructionWords);

// A megakernel's config with the type of Q, KV, P and O (bf16 or half, 2 bytes both), and whether a
// box of the copy engine brings a whole tile of KV. Cache blocks of another size have a kernel of
// their own: its loaders want registers, and code that nobody runs costs others a microsecond. So
// have batches whose row groups are all narrow, of at most kNarrowRows, or kNarrowestRows.
template <class Element_, bool kWholeTileBoxes_, int kRows_>
struct MlaConfig : mk::DefaultConfig {
    using Element = Element_;
    static constexpr bool kWholeTileBoxes = kWholeTileBoxes_;
    static constexpr int kRows = kRows_;  // of a row group, at most
    static constexpr bool kNarrow = kRows <= kNarrowRows;
    static constexpr bool kStampsResults = kRows <= kNarrowestRows;  // see stamp.cuh
    static constexpr int kConsumerRegisters = kWholeTileBoxes ? 224 : 216;
    static constexpr int kControlRegisters = kWholeTileBoxes ? 56 : 72;
};
inline constexpr int kElementBytes = 2;

// A page holds half the width of a tile of KV, 64 positions: 256 latent columns, as four 64-column
// blocks swizzled over 128 bytes, and 32 rope columns, swizzled over 64 bytes. So both halves hold
// whole wgmma operands, and each consumer warpgroup can own the half whose latent columns it
// accumulates into the output. The four blocks of eight positions lie together, a KV group: that
// is an order in which the copy engine can put down boxes of any height.
//
// In a wide kernel two pages hold 64 rows of Q in the same way, but block by block.
inline constexpr int kHalfLatent = kLatentDim / 2;
inline constexpr int kHalfRope = kRopeDim / 2;
inline constexpr int kBlockCols = 64;  // columns of a 128-byte swizzle block
inline constexpr int kBlockRowBytes = kBlockCols * kElementBytes;
inline constexpr int kRopeRowBytes = kHalfRope * kElementBytes;
inline constexpr int kLatentBlocks = kLatentDim / kBlockCols;
inline constexpr int kHalfBlocks = kHalfLatent / kBlockCols;
inline constexpr int kHalfRowBytes = kHalfBlocks * kBlockRowBytes + kRopeRowBytes;
inline constexpr int kGroupRowsLog2 = 3;
// Positions or rows that a swizzle pattern repeats over.
inline constexpr int kGroupRows = 1 << kGroupRowsLog2;
inline constexpr int kGroupBytes = kGroupRows * kBlockRowBytes;  // of one block
inline constexpr int kKvGroupBytes = kHalfBlocks * kGroupBytes;
inline constexpr int kHalfLatentBytes = kKvTile * kHalfBlocks * kBlockRowBytes;
inline constexpr int kHalfTileBytes = kKvTile * kHalfRowBytes;
static_assert(kMaxRows == kKvTile, "Q and KV tiles share pages");

// Which warpgroup, and which half of the latent columns.
enum Half { kLeft = 0, kRight = 1 };

// The new tokens of a sequence, as q and the output count them.
struct TokenSpan {
    int first;
    int count;
};

struct Strides {
    int64_t block, token, head;  // bytes
};

struct MlaGlobals {
    // Q [tokens * heads, width]: boxes of q_box_rows rows, latent columns by the half tile, in a
    // narrow kernel all of them.
    CUtensorMap q_latent;
    CUtensorMap q_rope;
    // KV: boxes of half the width of kv_box_rows positions, latent columns in KV groups.
    CUtensorMap kv_latent;
    CUtensorMap kv_rope;

    mk::MegakernelArgs megakernel;

    const int32_t* block_ids;     // of request r from r * table_stride or kv_indptr[r] on
    const int32_t* kv_indptr;     // null: a table
    const int32_t* cu_seqlens_q;  // [num_requests + 1]; null: s_q tokens each
    const char* latent;           // the cache, for copies row by row
    const char* rope;
    char* out;                // [tokens, heads, 512]
    float* o_scratch;         // [slots, slot_rows, 512]
    float* lse_log2_scratch;  // [slots, slot_rows]
    int32_t* done_flags;      // [slots]
    float* lse;               // may be null
    const float* attn_sink;   // [kv_heads * heads], natural log; may be null

    Strides latent_strides, rope_strides;
    int64_t lse_sequence_stride, lse_token_stride, lse_head_stride;
    uint64_t kv_policy;  // L2 eviction: one row group reads its KV once, several share it

    int32_t table_stride;
    int32_t num_blocks;
    int32_t kv_head_step;  // from one KV head's latent columns to the next one's, in swizzle blocks
    int32_t block_size;    // KV positions per block of the cache
    int32_t kv_box_rows;   // 64 or 16 positions by the copy engine; 0: row by row
    int32_t q_box_rows;    // of a row group: 64; in a narrow kernel a multiple of 8
    int32_t num_requests;
    int32_t total_tokens;  // of one KV head
    int32_t s_q;
    int32_t num_heads;  // query heads per KV head
    Divisor by_block_size, by_requests, by_tokens, by_s_q, by_heads;
    int32_t slot_rows;
    int32_t causal;
    int32_t lse_by_token;  // the LSE's place follows from the token, whatever the sequence
    float scale_log2;      // softmax_scale * log2(e)
    float lse_scale;       // from base 2 to the caller's base
    float lse_empty;       // of a row that sees no key

    __device__ void prefetch() const {
        mk::ptx::prefetch_tensor_map(q_latent);
        mk::ptx::prefetch_tensor_map(q_rope);
        mk::ptx::prefetch_tensor_map(kv_latent);
        mk::ptx::prefetch_tensor_map(kv_rope);
        fetch_parameters();
    }
    // What follows is in no cache of the SM yet, and to read it as it comes up costs a round trip
    // to L2 for every line. So all lines are read at once. (By an index that the compiler does not
    // know to be 0, and to a purpose: or the loads would come one by one, or not at all.)
    __device__ void fetch_parameters() const {
        constexpr int kLineWords = 64 / sizeof(uint32_t);
        const auto* words = reinterpret_cast<const uint32_t*>(this) + blockIdx.z;
        uint32_t all = ~0u;
#pragma unroll
        for (int i = offsetof(MlaGlobals, megakernel) / sizeof(uint32_t);
             i < sizeof(MlaGlobals) / sizeof(uint32_t);
             i += kLineWords) {
            all &= words[i];
        }
        if (all == ~0u) __nanosleep(1);
    }

    // Sequences go through the requests of KV head 0, then those of head 1, ...
    __device__ int kv_head_of(int sequence) const { return by_requests.quotient(sequence); }
    __device__ int request_of(int sequence) const {
        return sequence - kv_head_of(sequence) * num_requests;
    }
    // Block of the cache that holds a position, counted in the request, and the place in it.
    __device__ int block_of(int position) const { return by_block_size.quotient(position); }
    __device__ int place_in_block(int position) const {
        return position - block_of(position) * block_size;
    }

    __device__ TokenSpan tokens_of(int sequence) const {
        if (cu_seqlens_q == nullptr) [[likely]]
            return {sequence * s_q, s_q};
        const int32_t* begin = cu_seqlens_q + request_of(sequence);
        const int first = __ldg(begin);
        return {kv_head_of(sequence) * total_tokens + first, __ldg(begin + 1) - first};
    }
    __device__ int num_rows_of(int sequence) const { return tokens_of(sequence).count * num_heads; }

    // Row `row` of a slot's row group.
    __device__ int64_t scratch_row(uint32_t slot, uint32_t row) const {
        return uint64_t{slot} * static_cast<uint32_t>(slot_rows) + row;
    }
    // Of a row as the output counts it.
    __device__ void store_lse(int flat_row, float lse_log2) const {
        if (lse == nullptr) return;
        const int token = by_heads.quotient(flat_row);
        int64_t at = (flat_row - token * num_heads) * lse_head_stride;
        if (lse_by_token) {
            at += token * lse_token_stride;
        } else {
            const int sequence = by_s_q.quotient(token);
            at += sequence * lse_sequence_stride + (token - sequence * s_q) * lse_token_stride;
        }
        lse[at] = lse_log2 == -INFINITY ? lse_empty : lse_log2 * lse_scale;
    }
    // Logit of the attention sink of a row's head in base 2; -inf without one.
    __device__ float sink_log2(int flat_row) const {
        constexpr float kLog2E = 1.4426950408889634f;
        if (attn_sink == nullptr) return -INFINITY;
        const int token = by_heads.quotient(flat_row), kv_head = by_tokens.quotient(token);
        const int head = kv_head * num_heads + flat_row - token * num_heads;
        return __ldg(&attn_sink[head]) * kLog2E;
    }
};

// A negative destination is a scratch slot.
__device__ __forceinline__ bool writes_scratch(int dst_batch) { return dst_batch < 0; }
__device__ __forceinline__ int scratch_slot(int dst_batch) { return -dst_batch - 1; }

// 16 bytes of a row: of a partial result, or of the output. Partial results are read soon, by the
// reductions, and then no more: until then they stay in L2, whatever streams through it.
__device__ __forceinline__ void store_16_bytes(float* to, const float4& value) {
    mk::ptx::store_float4(to, unstamped(value), mk::ptx::kEvictLast);
}
__device__ __forceinline__ void store_16_bytes(float* to, const StampedColumns& value) {
    mk::ptx::store_relaxed_gpu_16_bytes(to, value, mk::ptx::kEvictLast);
}
template <class Element>
__device__ __forceinline__ void store_16_bytes(Element* to, const float4& value) {
    *reinterpret_cast<float4*>(to) = value;
}

// Writes 16 bytes of a row; `to` is their place in the first one.
template <class T>
__device__ __forceinline__ auto row_writer(T* to) {
    return [to](int row, const float4& value) { store_16_bytes(to + row * kLatentDim, value); };
}
// The same, of rows with these LSEs, stamped.
__device__ __forceinline__ auto stamped_row_writer(float* to, Stamp stamp, const float* lse_log2) {
    return [to, stamp, lse_log2](int row, const float4& value) {
        store_16_bytes(to + row * kLatentDim, stamp.put_on(value, lse_log2[row]));
    };
}

// Two floats to the element type.
__device__ __forceinline__ uint32_t round_pair(float2 pair, kittens::bf16) {
    const __nv_bfloat162 rounded = __float22bfloat162_rn(pair);
    return *reinterpret_cast<const uint32_t*>(&rounded);
}
__device__ __forceinline__ uint32_t round_pair(float2 pair, kittens::half) {
    const __half2 rounded = __float22half2_rn(pair);
    return *reinterpret_cast<const uint32_t*>(&rounded);
}

// Named barriers (bar.sync ids; 0 is __syncthreads). Named for what is true after the wait.
enum class NamedBarrier : int {
    kWarpgroupSynced = 1,  // + warpgroup: its 128 threads
    kConsumersSynced = 3,
    // P of an even tile, or of an odd one, and its maxima are in scratch.
    kEvenPReady = 4,
    kOddPReady = 5,
    kSumsReady = 6,  // + warpgroup: its own are in scratch, for the other one
};
inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kConsumerThreads = 2 * kWarpgroupThreads;

__device__ __forceinline__ void barrier_sync(NamedBarrier barrier, int threads) {
    mk::ptx::named_barrier_sync(static_cast<int>(barrier), threads);
}
__device__ __forceinline__ void barrier_arrive(NamedBarrier barrier, int threads) {
    mk::ptx::named_barrier_arrive(static_cast<int>(barrier), threads);
}
// A warpgroup's sums have a barrier of their own: who has told of the last P does not wait until it
// has been read, and would be counted with those who do.
__device__ __forceinline__ NamedBarrier sums_ready(int warpgroup) {
    return static_cast<NamedBarrier>(static_cast<int>(NamedBarrier::kSumsReady) + warpgroup);
}
// The barrier of one of the consumers' warpgroups.
__device__ __forceinline__ int warpgroup_barrier(int warpgroup) {
    return static_cast<int>(NamedBarrier::kWarpgroupSynced) + warpgroup;
}

__device__ __forceinline__ bool is_first_lane() {
    return mk::ptx::thread_in_cta() % mk::kWarpThreads == 0;
}

// For what all lanes of a warp have done before.
template <class State>
__device__ __forceinline__ void arrive_warp(const State& state, int semaphore) {
    __syncwarp();
    if (is_first_lane()) state.arrive(semaphore);
}

}  // namespace mla
