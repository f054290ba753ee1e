// The MLA decode megakernel: its instruction set, and the way from tensors in
// global memory to a launch. Raw pointers only.
#pragma once

#include <array>
#include <optional>

#include "instructions/mla_fill.cuh"
#include "instructions/mla_partial.cuh"
#include "instructions/mla_reduction.cuh"
#include "megakernel/launch.h"

namespace mla {

// The last one's code comes first in the kernel, so that nothing is in the way of partials, which
// every launch runs.
template <class Config>
using MlaOps = mk::OpcodeList<MlaReduction<Config>, MlaFill<Config>, mk::Noop, MlaPartial<Config>>;

// Sizes, strides (in elements) and choices that calls of one kind share. See MlaGlobals.
struct DecodeLayout {
    bool fp16 = false;
    int num_heads = 0;
    int num_kv_heads = 1;
    int num_requests = 0;
    int s_q = 1;  // of a batch without cu_seqlens_q
    int total_tokens = 0;
    int64_t q_nope_row_stride = 0, q_pe_row_stride = 0;
    int num_blocks = 0, block_size = 0;
    std::array<int64_t, 3> latent_strides{}, rope_strides{};  // block, token, KV head
    int table_stride = 0;
    std::array<int64_t, 3> lse_strides{};  // sequence, token, head
    int slot_rows = 0;
    float softmax_scale = 0.f;
    bool causal = true;
    bool lse_base2 = false;
    float lse_empty = 0.f;
    int device = 0;
};

// Addresses of one call; null where the layout or the caller has no use for it.
struct DecodePointers {
    const void* instructions;
    int num_instructions;
    void* timings;
    void* queue_state;
    const void* q_nope;
    const void* q_pe;
    const void* latent;
    const void* rope;
    const void* block_ids;
    const void* kv_indptr;
    const void* cu_seqlens_q;
    void* out;
    void* lse;
    const void* attn_sink;
    void* o_scratch;
    void* lse_log2_scratch;
    void* done_flags;
};

struct LaunchOptions {
    bool instructions_are_constant = false;  // see mk::MegakernelArgs
    int tic = 0;
    mk::Grid grid{0};  // 0: one CTA per SM
    uint32_t timeout_us = 0;
    cudaStream_t stream = nullptr;
};

namespace detail {

inline uint64_t bytes(int64_t elements) { return static_cast<uint64_t>(elements) * kElementBytes; }

inline uint64_t num_q_rows(const DecodeLayout& layout) {
    return static_cast<uint64_t>(layout.num_kv_heads) * layout.total_tokens * layout.num_heads;
}

// Rows of the largest row group. Where sequences differ in their tokens, a slot tells.
inline int most_group_rows(const DecodeLayout& layout, bool ragged) {
    const int rows = layout.s_q * layout.num_heads;
    return ragged ? layout.slot_rows : std::min(group_rows_of(layout.slot_rows), rows);
}

// All rows of a group at once.
inline int q_box_rows(const DecodeLayout& layout, bool ragged) {
    const int rows = most_group_rows(layout, ragged);
    return rows <= kNarrowRows ? (rows + 7) / 8 * 8 : kMaxRows;
}
inline bool is_narrow(int q_box_rows) { return q_box_rows <= kNarrowRows; }

inline CUtensorMapDataType tensor_type(const DecodeLayout& layout) {
    return layout.fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

// Latent columns of queries, by the swizzle block: [row, block, column].
inline CUtensorMap encode_q_latent(const DecodeLayout& layout, const void* base, int box_rows) {
    const bool narrow = is_narrow(box_rows);
    const mk::TensorMapSpec<3> spec{tensor_type(layout),
                                    base,
                                    {kBlockCols, num_q_rows(layout), kLatentBlocks},
                                    {bytes(layout.q_nope_row_stride), kBlockRowBytes},
                                    {kBlockCols,
                                     static_cast<uint32_t>(box_rows),
                                     static_cast<uint32_t>(narrow ? kLatentBlocks : kHalfBlocks)},
                                    CU_TENSOR_MAP_SWIZZLE_128B};
    return mk::encode_tensor_map("q_nope", spec);
}

inline CUtensorMap encode_q_rope(const DecodeLayout& layout, const void* base, int box_rows) {
    const bool narrow = is_narrow(box_rows);
    const mk::TensorMapSpec<2> spec{
        tensor_type(layout),
        base,
        {kRopeDim, num_q_rows(layout)},
        {bytes(layout.q_pe_row_stride)},
        {static_cast<uint32_t>(narrow ? kRopeDim : kHalfRope), static_cast<uint32_t>(box_rows)},
        narrow ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B};
    return mk::encode_tensor_map("q_pe", spec);
}

// [block of the cache, group of eight positions, swizzle block, position, column]: the order in
// which a box of it lies in a page. The swizzle blocks go through all KV heads.
inline CUtensorMap encode_latent(const DecodeLayout& layout, const void* base, int box_rows) {
    const auto [block, token, head] = layout.latent_strides;
    const auto other_heads = static_cast<uint64_t>(layout.num_kv_heads - 1);
    const mk::TensorMapSpec<5> spec{
        tensor_type(layout),
        base,
        {kBlockCols,
         kGroupRows,
         other_heads * static_cast<uint64_t>(head / kBlockCols) + kLatentBlocks,
         static_cast<uint64_t>(layout.block_size) / kGroupRows,
         static_cast<uint64_t>(layout.num_blocks)},
        {bytes(token), kBlockRowBytes, bytes(kGroupRows * token), bytes(block)},
        {kBlockCols, kGroupRows, kHalfBlocks, static_cast<uint32_t>(box_rows) / kGroupRows, 1},
        CU_TENSOR_MAP_SWIZZLE_128B};
    return mk::encode_tensor_map("latent", spec);
}

inline CUtensorMap encode_rope(const DecodeLayout& layout, const void* base, int box_rows) {
    const auto [block, token, head] = layout.rope_strides;
    const mk::TensorMapSpec<4> spec{tensor_type(layout),
                                    base,
                                    {kRopeDim,
                                     static_cast<uint64_t>(layout.block_size),
                                     static_cast<uint64_t>(layout.num_kv_heads),
                                     static_cast<uint64_t>(layout.num_blocks)},
                                    {bytes(token), bytes(head), bytes(block)},
                                    {kHalfRope, static_cast<uint32_t>(box_rows), 1, 1},
                                    CU_TENSOR_MAP_SWIZZLE_64B};
    return mk::encode_tensor_map("rope", spec);
}

inline Strides byte_strides(const std::array<int64_t, 3>& s) {
    return {s[0] * kElementBytes, s[1] * kElementBytes, s[2] * kElementBytes};
}

// The highest box of KV positions that never crosses a block; 0: none.
inline int kv_box_rows(const DecodeLayout& layout) {
    if (layout.num_kv_heads > 1 && layout.latent_strides[2] % kBlockCols != 0) return 0;
    for (const int rows : {64, 16}) {
        if (layout.block_size % rows == 0) return rows;
    }
    return 0;
}

}  // namespace detail

// What calls of one layout share: all but addresses. (Tensor maps want one from the beginning.)
inline MlaGlobals shared_globals(const DecodeLayout& layout, const DecodePointers& p) {
    constexpr double kLog2E = 1.4426950408889634;
    constexpr float kLn2 = 0.693147180559945f;
    const bool ragged = p.cu_seqlens_q != nullptr;
    MlaGlobals g{};
    g.num_requests = layout.num_requests;
    g.total_tokens = layout.total_tokens;
    g.s_q = layout.s_q;
    g.num_heads = layout.num_heads;
    g.by_requests = Divisor::of(std::max(1, layout.num_requests));
    g.by_tokens = Divisor::of(std::max(1, layout.total_tokens));
    g.by_s_q = Divisor::of(std::max(1, layout.s_q));
    g.by_heads = Divisor::of(layout.num_heads);
    g.by_block_size = Divisor::of(layout.block_size);
    g.slot_rows = layout.slot_rows;
    g.block_size = layout.block_size;
    g.num_blocks = layout.num_blocks;
    g.table_stride = layout.table_stride;
    g.kv_box_rows = detail::kv_box_rows(layout);
    g.kv_head_step =
        layout.num_kv_heads > 1 ? static_cast<int>(layout.latent_strides[2] / kBlockCols) : 0;
    g.q_box_rows = detail::q_box_rows(layout, ragged);
    g.causal = layout.causal;
    g.scale_log2 = static_cast<float>(layout.softmax_scale * kLog2E);
    g.lse_scale = layout.lse_base2 ? 1.f : kLn2;
    g.lse_empty = layout.lse_empty;
    g.latent_strides = detail::byte_strides(layout.latent_strides);
    g.rope_strides = detail::byte_strides(layout.rope_strides);
    const auto [sequence_stride, token_stride, head_stride] = layout.lse_strides;
    g.lse_sequence_stride = sequence_stride;
    // A sequence stride of 0: the LSE is laid out by the token.
    g.lse_by_token = ragged || layout.s_q == 1 || sequence_stride == 0 ||
                     sequence_stride == layout.s_q * token_stride;
    const bool token_is_sequence = !ragged && layout.s_q == 1 && sequence_stride != 0;
    g.lse_token_stride = token_is_sequence ? sequence_stride : token_stride;
    g.lse_head_stride = head_stride;
    const bool shared = ragged || layout.s_q * layout.num_heads > g.q_box_rows;
    g.kv_policy = shared ? mk::ptx::kEvictNormal : mk::ptx::kEvictFirst;

    g.q_latent = detail::encode_q_latent(layout, p.q_nope, g.q_box_rows);
    g.q_rope = detail::encode_q_rope(layout, p.q_pe, g.q_box_rows);
    if (g.kv_box_rows > 0) {
        g.kv_latent = detail::encode_latent(layout, p.latent, g.kv_box_rows);
        g.kv_rope = detail::encode_rope(layout, p.rope, g.kv_box_rows);
    }
    return g;
}

inline void set_addresses(MlaGlobals& g, const DecodePointers& p) {
    mk::move_tensor_map("q_nope", g.q_latent, p.q_nope);
    mk::move_tensor_map("q_pe", g.q_rope, p.q_pe);
    if (g.kv_box_rows > 0) {
        mk::move_tensor_map("latent", g.kv_latent, p.latent);
        mk::move_tensor_map("rope", g.kv_rope, p.rope);
    } else {  // never used, but prefetched
        g.kv_latent = g.q_latent;
        g.kv_rope = g.q_rope;
    }
    g.megakernel.instructions = static_cast<const int32_t*>(p.instructions);
    g.megakernel.num_instructions = p.num_instructions;
    g.megakernel.queue = static_cast<mk::QueueState*>(p.queue_state);
    g.megakernel.timings = static_cast<int32_t*>(p.timings);

    g.block_ids = static_cast<const int32_t*>(p.block_ids);
    g.kv_indptr = static_cast<const int32_t*>(p.kv_indptr);
    g.cu_seqlens_q = static_cast<const int32_t*>(p.cu_seqlens_q);
    g.latent = static_cast<const char*>(p.latent);
    g.rope = static_cast<const char*>(p.rope);
    g.out = static_cast<char*>(p.out);
    g.o_scratch = static_cast<float*>(p.o_scratch);
    g.lse_log2_scratch = static_cast<float*>(p.lse_log2_scratch);
    g.done_flags = static_cast<int32_t*>(p.done_flags);
    g.lse = static_cast<float*>(p.lse);
    g.attn_sink = static_cast<const float*>(p.attn_sink);
}

// Enqueues one of the megakernels. Each element type has a translation unit for 16, 32 and 64 rows,
// see python/bindings/.
template <class Element, int kRows, bool kWholeTileBoxes, bool kTimed>
void launch_variant(const MlaGlobals& globals, mk::Grid grid, int device, cudaStream_t stream) {
    using Plain = MlaConfig<Element, kWholeTileBoxes, kRows>;
    using Config = std::conditional_t<kTimed, mk::WithTimings<Plain>, Plain>;
    mk::launch<Config, MlaOps<Config>>(globals, grid, device, stream);
}

template <class Element, int kRows>
void launch_family(
    const MlaGlobals& globals, bool timed, mk::Grid grid, int device, cudaStream_t stream) {
    const bool whole = globals.kv_box_rows == kKvTile;
    const auto launch = whole ? (timed ? &launch_variant<Element, kRows, true, true>
                                       : &launch_variant<Element, kRows, true, false>)
                              : (timed ? &launch_variant<Element, kRows, false, true>
                                       : &launch_variant<Element, kRows, false, false>);
    launch(globals, grid, device, stream);
}

// How many clusters of these kernels run at a time; all have the same shared memory.
int max_clusters(int cluster_ctas, int device);
extern template void launch_family<kittens::bf16, kNarrowestRows>(
    const MlaGlobals&, bool, mk::Grid, int, cudaStream_t);
extern template void launch_family<kittens::bf16, kNarrowRows>(
    const MlaGlobals&, bool, mk::Grid, int, cudaStream_t);
extern template void launch_family<kittens::bf16, kMaxRows>(
    const MlaGlobals&, bool, mk::Grid, int, cudaStream_t);
extern template void launch_family<kittens::half, kNarrowestRows>(
    const MlaGlobals&, bool, mk::Grid, int, cudaStream_t);
extern template void launch_family<kittens::half, kNarrowRows>(
    const MlaGlobals&, bool, mk::Grid, int, cudaStream_t);
extern template void launch_family<kittens::half, kMaxRows>(
    const MlaGlobals&, bool, mk::Grid, int, cudaStream_t);

// The megakernels for boxes of so many rows of Q.
template <class Element>
auto family_for(int q_box_rows) {
    if (q_box_rows <= kNarrowestRows) return &launch_family<Element, kNarrowestRows>;
    if (q_box_rows <= kNarrowRows) return &launch_family<Element, kNarrowRows>;
    return &launch_family<Element, kMaxRows>;
}

// Decodes of one layout. What they share is worked out once, by the first. One thread at a time.
class Decoder {
  public:
    explicit Decoder(const DecodeLayout& layout) : layout_(layout) {}

    // Enqueues the decode of one queue. Throws std::runtime_error; launches nothing then.
    void launch(const DecodePointers& pointers, const LaunchOptions& options) {
        const mk::DeviceGuard guard(layout_.device);
        std::optional<MlaGlobals>& shared = shared_[pointers.cu_seqlens_q != nullptr];
        if (!shared) shared = shared_globals(layout_, pointers);
        MlaGlobals& globals = *shared;
        set_addresses(globals, pointers);
        globals.megakernel.instructions_are_constant = options.instructions_are_constant;
        globals.megakernel.tic = options.tic;
        globals.megakernel.timeout_us = options.timeout_us;
        globals.megakernel.failure = mk::FailureRecords::device(layout_.device);
        mk::Grid grid = options.grid;
        if (grid.num_ctas == 0) grid.num_ctas = mk::num_sms(layout_.device);
        const auto launch = layout_.fp16 ? family_for<kittens::half>(globals.q_box_rows)
                                         : family_for<kittens::bf16>(globals.q_box_rows);
        launch(globals, pointers.timings != nullptr, grid, layout_.device, options.stream);
    }

  private:
    DecodeLayout layout_;
    std::optional<MlaGlobals> shared_[2];  // by whether sequences differ in their tokens
};

}  // namespace mla
