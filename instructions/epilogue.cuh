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

// How a warp gives away its 16 rows of half the output: 512 bytes of each row go through shared
// memory at a time, so that they leave as whole cache lines. The pad keeps the eight rows that a
// warp puts down at once in different banks.
template <class T>
class Staging {
    static constexpr int kRowBytes = mk::kWarpThreads * sizeof(uint4);
    static constexpr int kWarpRows = 16;

  public:
    static constexpr int kPitch = kRowBytes + 8 * sizeof(T);  // from a row to the next one
    static constexpr int kCols = kRowBytes / sizeof(T);

  private:
    static constexpr int kWarpBytes = kWarpRows * kPitch;
    static_assert(4 * kWarpBytes <= kHalfTileBytes, "a warpgroup stages in one page");

  public:
    __device__ explicit Staging(uint32_t page) : own_(page + warp() * kWarpBytes) {}

    // Gives away o * scale, of rows below num_rows: use_from(column)(row, 16 bytes of T). Half is
    // on its way while the other half is put down: of the columns, or of the rows where a row of T
    // fits.
    template <class UseFrom>
    __device__ void give(const Accumulator& o,
                         const RowScale& scale,
                         int num_rows,
                         UseFrom use_from) const {
        if constexpr (kCols < kHalfLatent) {
#pragma unroll
            for (int first = 0; first < kHalfLatent; first += kCols) {
                put_columns(o, scale, first);
                give_rows(0, kWarpRows, num_rows, use_from(first + first_col()));
            }
        } else {
            put_rows<0>(o, scale);
            const auto use = use_from(first_col());
            give_rows(0, kWarpRows / 2, num_rows, use);
            put_rows<1>(o, scale);
            give_rows(kWarpRows / 2, kWarpRows, num_rows, use);
        }
    }

  private:
    const uint32_t own_;  // of the warp

    __device__ static int warp() {
        return mk::ptx::thread_in_cta() % kWarpgroupThreads / mk::kWarpThreads;
    }
    __device__ static int lane() { return mk::ptx::thread_in_cta() % mk::kWarpThreads; }
    // Of those that this thread gives away.
    __device__ static int first_col() { return lane() * (kCols / mk::kWarpThreads); }

    // Floats, kCols columns from `first` on.
    __device__ void put_columns(const Accumulator& o, const RowScale& scale, int first) const {
        const uint32_t to =
            own_ + lane() / 4 * kPitch + lane() % 4 * static_cast<uint32_t>(sizeof(float2));
#pragma unroll
        for (int i = 0; i < kCols / 16; ++i) {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                const float2 pair = scaled(o.tiles[0][first / 16 + i].data[part], scale, part);
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(
                                 to + part % 2 * 8 * kPitch +
                                 (i * 16 + part / 2 * 8) * static_cast<uint32_t>(sizeof(float))),
                             "f"(pair.x),
                             "f"(pair.y)
                             : "memory");
            }
        }
        __syncwarp();
    }
    // The upper eight of the warp's rows, or the lower ones: four matrices of eight columns at a
    // time.
    template <int kLower>
    __device__ void put_rows(const Accumulator& o, const RowScale& scale) const {
        const uint32_t to = own_ + (kLower * 8 + lane() % 8) * kPitch + lane() / 8 * 16;
#pragma unroll
        for (int i = 0; i < kCols / 32; ++i) {
            uint32_t rounded[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int part = j % 2 * 2 + kLower;
                rounded[j] =
                    round_pair(scaled(o.tiles[0][2 * i + j / 2].data[part], scale, part), T{});
            }
            mk::ptx::store_matrices(to + i * 32 * sizeof(T), rounded);
        }
        __syncwarp();
    }
    __device__ static float2 scaled(const float2& pair, const RowScale& scale, int part) {
        return {pair.x * scale.factor[part % 2], pair.y * scale.factor[part % 2]};
    }

    // What lies here, rows [begin, end) of the warp's.
    template <class Use>
    __device__ void give_rows(int begin, int end, int num_rows, Use use) const {
        constexpr int kTogether = 4;
        const int first = warp() * kWarpRows, rows = min(end, num_rows - first);
        const uint32_t from = own_ + lane() * static_cast<uint32_t>(sizeof(float4));
#pragma unroll 1
        for (; begin < rows; begin += kTogether) {
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
};

}  // namespace mla
