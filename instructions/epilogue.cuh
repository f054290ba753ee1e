// Both ends of an MLA partial's KV range: clearing rows of V that the request does
// not have, and writing the output from registers.
#pragma once

#include "instructions/softmax.cuh"

namespace mla {

// Zeroes latent rows [first, 64) of a half tile, by one warpgroup. Swizzling permutes within a row
// of a block only.
__device__ __forceinline__ void clear_rows(uint32_t page, int first) {
    constexpr int kChunks = kHalfBlocks * kBlockRowBytes / 16;  // of a row
    constexpr int kChunksPerBlock = kBlockRowBytes / 16;
#pragma unroll 1
    for (int i = mk::ptx::thread_in_cta() % kWarpgroupThreads; i < (kKvTile - first) * kChunks;
         i += kWarpgroupThreads) {
        const int row = first + i / kChunks, chunk = i % kChunks;
        const int at = row / kGroupRows * kKvGroupBytes + chunk / kChunksPerBlock * kGroupBytes +
                       row % kGroupRows * kBlockRowBytes + chunk % kChunksPerBlock * 16;
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(latent_address(page) + at),
                     "r"(0)
                     : "memory");
    }
}

// How a warp writes its 16 rows of half the output: 512 bytes of each row go through shared memory
// at a time, so that they leave as whole cache lines. The pad keeps the eight rows that a warp puts
// down at once in different banks.
template <class T>
struct Staging {
    static constexpr int kRowBytes = mk::kWarpThreads * sizeof(uint4);
    static constexpr int kPitch = kRowBytes + 8 * sizeof(T);
    static constexpr int kCols = kRowBytes / sizeof(T);
    static constexpr int kWarpRows = 16;
    static constexpr int kWarpBytes = kWarpRows * kPitch;
    static_assert(4 * kWarpBytes <= kHalfTileBytes, "a warpgroup stages in one page");
};

// Gives away o * scale in the rows below num_rows, by way of `page`, 16 bytes at a time:
// way(column in this half)(row, 16 bytes of T).
template <class T, class Way>
__device__ __forceinline__ void store_rows(
    const Accumulator& o, const RowScale& scale, uint32_t page, int num_rows, Way way) {
    using S = Staging<T>;
    const int thread = mk::ptx::thread_in_cta() % kWarpgroupThreads;
    const int warp = thread / mk::kWarpThreads, lane = thread % mk::kWarpThreads;
    const int rows = min(S::kWarpRows, num_rows - warp * S::kWarpRows);
    const uint32_t staged = page + warp * S::kWarpBytes;
    const uint32_t own = staged + lane / 4 * S::kPitch + lane % 4 * 2 * sizeof(T);
    const int first_row = warp * S::kWarpRows, first_col = lane * (S::kCols / mk::kWarpThreads);
#pragma unroll
    for (int first = 0; first < kHalfLatent; first += S::kCols) {
#pragma unroll
        for (int i = 0; i < S::kCols / 4; ++i) {  // groups of eight columns, upper and lower row
            float2 pair = o.tiles[0][(first / 4 + i) / 4].data[i % 4];
            pair.x *= scale.factor[i % 2];
            pair.y *= scale.factor[i % 2];
            const uint32_t to = own + i / 2 * 8 * sizeof(T) + i % 2 * 8 * S::kPitch;
            if constexpr (std::is_same_v<T, float>) {
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(pair.x), "f"(pair.y)
                             : "memory");
            } else {
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(round_pair(pair, T{}))
                             : "memory");
            }
        }
        __syncwarp();
        const auto put = way(first_col + first);
#pragma unroll 4
        for (int row = 0; row < rows; ++row) {
            put(first_row + row,
                mk::ptx::load_smem_float4(staged + row * S::kPitch + lane * sizeof(float4)));
        }
        __syncwarp();
    }
}

}  // namespace mla
