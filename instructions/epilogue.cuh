// Both ends of an MLA partial's KV range: clearing rows of V that the request does
// not have, and writing the output from registers.
#pragma once

#include "instructions/softmax.cuh"

namespace mla {

// Zeroes latent rows [first, 64) of a half tile, by one warpgroup: a row a warp, 16 bytes a lane.
// Swizzling permutes within a row of a block only.
__device__ __forceinline__ void clear_rows(uint32_t page, int first) {
    constexpr int kLanesPerBlock = kBlockRowBytes / 16;
    static_assert(kHalfBlocks * kLanesPerBlock == mk::kWarpThreads);
    const int thread = mk::ptx::thread_in_cta() % kWarpgroupThreads;
    const int lane = thread % mk::kWarpThreads;
    const uint32_t own =
        latent_address(page) + lane / kLanesPerBlock * kGroupBytes + lane % kLanesPerBlock * 16;
#pragma unroll 1
    for (int row = first + thread / mk::kWarpThreads; row < kKvTile; row += 4) {
        mk::ptx::store_smem_float4(
            own + row / kGroupRows * kKvGroupBytes + row % kGroupRows * kBlockRowBytes, {});
    }
}

// How a warp writes its 16 rows of half the output: 512 bytes of each row go through shared memory
// at a time, so that they leave as whole cache lines. The pad keeps the eight rows that a warp puts
// down at once in different banks.
template <class T>
class Staging {
    static constexpr int kRowBytes = mk::kWarpThreads * sizeof(uint4);
    static constexpr int kWarpRows = 16;

  public:
    static constexpr int kPitch = kRowBytes + 8 * sizeof(T);  // from a row to the next one

  private:
    static constexpr int kWarpBytes = kWarpRows * kPitch;
    static_assert(4 * kWarpBytes <= kHalfTileBytes, "a warpgroup stages in one page");

  public:
    static constexpr int kCols = kRowBytes / sizeof(T);

    __device__ explicit Staging(uint32_t page) : own_(page + warp() * kWarpBytes) {}

    // Puts down o * scale, kCols columns from `first` on.
    __device__ void put(const Accumulator& o, const RowScale& scale, int first) const {
#pragma unroll
        for (int i = 0; i < kCols / 16; ++i) {
            float2 tile[4];  // columns 0 and 8, of the upper row and the lower one
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                tile[part] = o.tiles[0][first / 16 + i].data[part];
                tile[part].x *= scale.factor[part % 2];
                tile[part].y *= scale.factor[part % 2];
            }
            put(i * 16 * sizeof(T), tile);
        }
        __syncwarp();
    }

    // Gives away what lies here, of rows below num_rows: use(row, 16 bytes of T), from first_col()
    // on.
    template <class Use>
    __device__ void give(int num_rows, Use use) const {
        constexpr int kTogether = 4;
        const int first = warp() * kWarpRows, rows = min(kWarpRows, num_rows - first);
        const uint32_t from = own_ + lane() * static_cast<uint32_t>(sizeof(float4));
#pragma unroll 1
        for (int begin = 0; begin < rows; begin += kTogether) {
            float4 v[kTogether];
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                v[i] = mk::ptx::load_smem_float4(from + (begin + i) * kPitch);
            }
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                if (begin + i < rows) use(first + begin + i, v[i]);
            }
        }
        __syncwarp();
    }
    // The first of the columns that this thread gives away.
    __device__ static int first_col() { return lane() * (kCols / mk::kWarpThreads); }

  private:
    const uint32_t own_;  // of the warp

    __device__ static int warp() {
        return mk::ptx::thread_in_cta() % kWarpgroupThreads / mk::kWarpThreads;
    }
    __device__ static int lane() { return mk::ptx::thread_in_cta() % mk::kWarpThreads; }

    __device__ void put(uint32_t offset, const float2 (&tile)[4]) const {
        if constexpr (std::is_same_v<T, float>) {
            const uint32_t to = own_ + offset + lane() / 4 * kPitch +
                                lane() % 4 * static_cast<uint32_t>(sizeof(float2));
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(
                                 to + part % 2 * 8 * kPitch +
                                 part / 2 * 8 * static_cast<uint32_t>(sizeof(float))),
                             "f"(tile[part].x),
                             "f"(tile[part].y)
                             : "memory");
            }
        } else {
            uint32_t rounded[4];
#pragma unroll
            for (int part = 0; part < 4; ++part) rounded[part] = round_pair(tile[part], T{});
            mk::ptx::store_matrices(own_ + offset + lane() % 16 * kPitch + lane() / 16 * 16,
                                    rounded);
        }
    }
};

}  // namespace mla
