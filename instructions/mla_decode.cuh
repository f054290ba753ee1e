// The MLA decode megakernel: its instruction set, and the way from tensors in
// global memory to a launch. Raw pointers only.
#pragma once

#include "instructions/mla_partial.cuh"
#include "instructions/mla_reduction.cuh"
#include "megakernel/launch.h"

namespace mla {

template <class Config>
using MlaOps = mk::OpcodeList<MlaPartial<Config>, MlaReduction<Config>, mk::Noop>;

using Config = mk::DefaultConfig;
using TimedConfig = mk::WithTimings<mk::DefaultConfig>;

// A tensor as the host sees it: sizes and strides in elements, outermost first.
struct Tensor {
    void* data = nullptr;
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
};

struct DecodeArgs {
    Tensor instructions;     // [n, 32] int32
    Tensor timings;          // [n, 8] int32, or none
    Tensor queue_state;      // [>= 32] int32
    Tensor q_rot;            // [batch, s_q, heads, 64] bf16
    Tensor q_v;              // [batch, s_q, heads, 512] bf16
    Tensor k_rot;            // [kv_blocks, block_size, 64] bf16
    Tensor v;                // [kv_blocks, block_size, 512] bf16
    Tensor table;            // [batch, max_blocks] int32
    Tensor o;                // [batch, s_q, heads, 512] bf16
    Tensor o_scratch;        // [slots, s_q, heads, 512] fp32
    Tensor lvec_scratch;     // [slots, s_q, heads] fp32
    Tensor completion_flag;  // [slots, s_q] int32
    Tensor lse;              // [batch, heads, s_q] fp32, or none
    float softmax_scale = 0.f;
    int tic = 0;
    int num_ctas = 0;  // 0: one per SM
    uint32_t timeout_us = 0;
    int device = 0;
    cudaStream_t stream = nullptr;
};

namespace detail {

inline uint64_t bytes(int64_t elements, int size) { return static_cast<uint64_t>(elements) * size; }

// [batch, s_q, heads, width] as [batch, s_q * heads, width], in boxes of rows x one swizzle block.
inline CUtensorMap encode_rows(const char* name,
                               const Tensor& t,
                               CUtensorMapDataType type,
                               int element_bytes,
                               int box_rows,
                               int box_cols) {
    const mk::TensorMapSpec<3> spec{
        type,
        t.data,
        {bytes(t.sizes[3], 1), bytes(t.sizes[1] * t.sizes[2], 1), bytes(t.sizes[0], 1)},
        {bytes(t.strides[2], element_bytes), bytes(t.strides[0], element_bytes)},
        {static_cast<uint32_t>(box_cols), static_cast<uint32_t>(box_rows), 1},
        box_cols * element_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B};
    return mk::encode_tensor_map(name, spec);
}

// Half the latent columns of 64 KV positions, as swizzle blocks.
inline CUtensorMap encode_kv_latent(const Tensor& t) {
    const mk::TensorMapSpec<4> spec{
        CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        t.data,
        {kBlockCols, bytes(t.sizes[1], 1), kLatentBlocks, bytes(t.sizes[0], 1)},
        {bytes(t.strides[1], 2), kBlockCols * 2, bytes(t.strides[0], 2)},
        {kBlockCols, kKvTile, kHalfBlocks, 1},
        CU_TENSOR_MAP_SWIZZLE_128B};
    return mk::encode_tensor_map("v", spec);
}

inline CUtensorMap encode_kv_rope(const Tensor& t) {
    const mk::TensorMapSpec<3> spec{CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                    t.data,
                                    {kRopeDim, bytes(t.sizes[1], 1), bytes(t.sizes[0], 1)},
                                    {bytes(t.strides[1], 2), bytes(t.strides[0], 2)},
                                    {kHalfRope, kKvTile, 1},
                                    CU_TENSOR_MAP_SWIZZLE_64B};
    return mk::encode_tensor_map("k_rot", spec);
}

}  // namespace detail

inline MlaGlobals make_globals(const DecodeArgs& a) {
    constexpr float kLog2E = 1.4426950408889634f;
    MlaGlobals g{};
    g.s_q = static_cast<int>(a.q_v.sizes[1]);
    g.num_heads = static_cast<int>(a.q_v.sizes[2]);
    g.row_group = std::min<int>(kMaxRows, g.s_q * g.num_heads);
    g.block_size = static_cast<int>(a.v.sizes[1]);
    g.scale_log2 = a.softmax_scale * kLog2E;

    constexpr auto kBf16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    g.q_latent = detail::encode_rows("q_v", a.q_v, kBf16, 2, g.row_group, kBlockCols);
    g.q_rope = detail::encode_rows("q_rot", a.q_rot, kBf16, 2, g.row_group, kHalfRope);
    g.kv_latent = detail::encode_kv_latent(a.v);
    g.kv_rope = detail::encode_kv_rope(a.k_rot);
    g.o = detail::encode_rows("o", a.o, kBf16, 2, g.row_group, kBlockCols);
    // A batch without splits may come without scratch.
    if (a.o_scratch.sizes[0] > 0) {
        g.o_scratch_map = detail::encode_rows("o_scratch",
                                              a.o_scratch,
                                              CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                                              4,
                                              g.row_group,
                                              kFp32BlockCols);
    } else {
        g.o_scratch_map = g.o;
    }

    g.megakernel.instructions = static_cast<const int32_t*>(a.instructions.data);
    g.megakernel.num_instructions = static_cast<int32_t>(a.instructions.sizes[0]);
    g.megakernel.tic = a.tic;
    g.megakernel.queue = static_cast<mk::QueueState*>(a.queue_state.data);
    g.megakernel.failure = mk::FailureRecords::device(a.device);
    g.megakernel.timings = static_cast<int32_t*>(a.timings.data);
    g.megakernel.timeout_us = a.timeout_us;

    g.kv_policy = g.s_q * g.num_heads > kMaxRows ? mk::ptx::kEvictNormal : mk::ptx::kEvictFirst;
    g.block_table = static_cast<const int32_t*>(a.table.data);
    g.table_stride = static_cast<int32_t>(a.table.strides[0]);
    g.o_ptr = static_cast<bf16*>(a.o.data);
    g.o_scratch = static_cast<float*>(a.o_scratch.data);
    g.lse_log2_scratch = static_cast<float*>(a.lvec_scratch.data);
    g.done_flags = static_cast<int32_t*>(a.completion_flag.data);
    g.lse = static_cast<float*>(a.lse.data);
    if (g.lse != nullptr) {
        g.lse_batch_stride = a.lse.strides[0];
        g.lse_head_stride = a.lse.strides[1];
        g.lse_token_stride = a.lse.strides[2];
    }
    return g;
}

// Enqueues the decode of one queue. Throws std::runtime_error; launches nothing then.
inline void launch_decode(const DecodeArgs& args) {
    const mk::DeviceGuard guard(args.device);
    const MlaGlobals globals = make_globals(args);
    const int num_ctas = args.num_ctas > 0 ? args.num_ctas : mk::num_sms(args.device);
    if (args.timings.data == nullptr) {
        mk::launch<Config, MlaOps<Config>>(globals, num_ctas, args.device, args.stream);
    } else {
        mk::launch<TimedConfig, MlaOps<TimedConfig>>(globals, num_ctas, args.device, args.stream);
    }
}

}  // namespace mla
