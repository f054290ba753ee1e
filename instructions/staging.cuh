// Shared-memory side of an MLA partial: clearing rows of V, and laying the output
// out as the copy engine stores it.
#pragma once

#include "instructions/softmax.cuh"

namespace mla {

// Zeroes latent rows [first, 64) of a half tile, by one warpgroup. Swizzling permutes within a row
// of a block only.
__device__ __forceinline__ void clear_rows(uint32_t half_tile, int first) {
    constexpr int kChunksPerRow = 128 / 16;
    const int per_block = (kKvTile - first) * kChunksPerRow;
    for (int i = mk::ptx::thread_in_cta() % kWarpgroupThreads; i < per_block * kHalfBlocks;
         i += kWarpgroupThreads) {
        const int chunk = (i / per_block * kKvTile + first) * kChunksPerRow + i % per_block;
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(latent_address(half_tile) +
                                                                      chunk * 16),
                     "r"(0)
                     : "memory");
    }
}

// Output is staged in blocks 128 bytes wide, one below the other, swizzled as the copy engine
// stores them: within a row of a block, 16-byte chunk c lies at c ^ (row % 8).
inline constexpr int kStagedRowBytes = 128;
inline constexpr int kFp32BlockCols = 32;
inline constexpr int kFp32Blocks = kHalfLatent / kFp32BlockCols;

// Address of an fp32 block. With more than 32 rows the second half of the blocks is in another
// page.
__device__ __forceinline__ uint32_t fp32_block(int block,
                                               uint32_t first,
                                               uint32_t rest,
                                               int num_rows) {
    const int bytes = num_rows * kStagedRowBytes;
    const bool moved = num_rows > 32 && block >= kFp32Blocks / 2;
    return moved ? rest + (block - kFp32Blocks / 2) * bytes : first + block * bytes;
}

// A thread's place in a block: its upper row, and the chunk that its column pair c8 = 0 falls in.
// Chunks 2 i further on differ in an exclusive or with constants.
struct StagedPlace {
    int upper_row;
    uint32_t offset;

    __device__ StagedPlace(int bytes_per_pair) : upper_row(fragment_row()) {
        const int pair_offset = mk::ptx::thread_in_cta() % 4 * bytes_per_pair;
        offset = upper_row * kStagedRowBytes +
                 (((pair_offset / 16) ^ (upper_row % 8)) * 16 | pair_offset % 16);
    }
};

// Both stage o * scale for the rows below num_rows.
__device__ __forceinline__ void stage_fp32(
    const Accumulator& o, const RowScale& scale, uint32_t first, uint32_t rest, int num_rows) {
    const StagedPlace place(sizeof(float2));
    const bool stored[2] = {place.upper_row < num_rows, place.upper_row + 8 < num_rows};
#pragma unroll
    for (int block = 0; block < kFp32Blocks; ++block) {
        const uint32_t base = fp32_block(block, first, rest, num_rows) + place.offset;
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // four groups of eight columns, upper and lower row
            const float2 pair = o.tiles[0][2 * block + i / 4].data[i % 4];
            const uint32_t address = (base ^ (i / 2 * 2 * 16)) + i % 2 * 8 * kStagedRowBytes;
            if (stored[i % 2]) {
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address),
                             "f"(pair.x * scale.factor[i % 2]),
                             "f"(pair.y * scale.factor[i % 2])
                             : "memory");
            }
        }
    }
}

__device__ __forceinline__ void stage_bf16(const Accumulator& o,
                                           const RowScale& scale,
                                           uint32_t first,
                                           int num_rows) {
    const StagedPlace place(sizeof(__nv_bfloat162));
    const bool stored[2] = {place.upper_row < num_rows, place.upper_row + 8 < num_rows};
#pragma unroll
    for (int block = 0; block < kHalfBlocks; ++block) {
        const uint32_t base = first + block * num_rows * kStagedRowBytes + place.offset;
#pragma unroll
        for (int i = 0; i < 16; ++i) {  // eight groups of eight columns, upper and lower row
            const float2 pair = o.tiles[0][4 * block + i / 4].data[i % 4];
            const uint32_t address = (base ^ (i / 2 * 16)) + i % 2 * 8 * kStagedRowBytes;
            const __nv_bfloat162 packed =
                __float22bfloat162_rn({pair.x * scale.factor[i % 2], pair.y * scale.factor[i % 2]});
            if (stored[i % 2]) {
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(address),
                             "r"(*reinterpret_cast<const uint32_t*>(&packed))
                             : "memory");
            }
        }
    }
}

}  // namespace mla
