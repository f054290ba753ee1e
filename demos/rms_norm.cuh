// The tutorial opcode: row-wise RMS-norm, layer after layer (docs/writing-an-opcode.md).
//
//     launcher   waits until another SM has written these rows of the layer below
//     loader     brings the rows in, a tile of four to a page
//     consumers  a warpgroup per tile, a warp per row, in place
//     storer     writes the pages back, passes them on, and tells the layer above
#pragma once

#include "megakernel/state.cuh"

namespace demo {
namespace ptx = mk::ptx;

struct RmsNormGlobals {
    mk::MegakernelArgs megakernel;
    float* x;              // [layers + 1, num_rows, num_cols]: layer l reads x[l], writes x[l + 1]
    const float* weights;  // [layers, num_cols]
    int32_t* done_flags;
    int64_t num_rows;
    int32_t num_cols;  // a multiple of 4
    float eps;
    __device__ void prefetch() const {}
};

enum RmsNormWord {  // after the opcode and the uid
    kLayer = 2,
    kRowBegin = 3,
    kNumRows = 4,    // 1 to kPages * kTileRows
    kWaitFlag = 5,   // done flag to wait for; -1: none
    kRaiseFlag = 6,  // done flag to raise; -1: none
};

template <class Config>
struct RmsNorm {
    static constexpr int kOpcode = 1;
    static constexpr mk::Role kPrefetchGate = mk::Role::kLoader;
    using State = mk::State<Config>;
    static constexpr int kPages = Config::kNumSmemPages;
    static constexpr int kTileRows = 4;  // one per warp of a warpgroup

    enum Semaphore {
        kInputWritten = 0,           // the layer below has stored these rows
        kLoaded,                     // + tile: its rows are in the page
        kNormed = kLoaded + kPages,  // + tile: and are normalised
        kNumSemaphores = kNormed + kPages,
    };
    static constexpr int num_tiles(int num_rows) { return (num_rows + kTileRows - 1) / kTileRows; }

    // The words, decoded. Tile t lies in page t.
    struct Work {
        const RmsNormGlobals& g;
        const State& state;
        const int layer = state.word(kLayer);
        const int row_begin = state.word(kRowBegin), num_rows = state.word(kNumRows);
        const int tiles = num_tiles(num_rows);
        __device__ int rows(int tile) const { return min(kTileRows, num_rows - tile * kTileRows); }
        __device__ uint32_t bytes(int tile) const { return rows(tile) * g.num_cols * 4; }
        __device__ float* data(int of_layer, int tile) const {
            return g.x + (of_layer * g.num_rows + row_begin + tile * kTileRows) * g.num_cols;
        }
    };

    struct Controller {
        __device__ static int arrival_count(const RmsNormGlobals&, int semaphore) {
            return semaphore >= kNormed ? 4 : 1;  // a tile is normalised by a warpgroup's warps
        }
        // Pages without a tile are given up first, the others as they are written back.
        __device__ static int released_page(const RmsNormGlobals&, const int32_t* words, int k) {
            return (num_tiles(words[kNumRows]) + k) % kPages;
        }
    };

    struct Launcher {
        __device__ static void run(const RmsNormGlobals& g, State& state) {
            if (threadIdx.x % mk::kWarpThreads != 0) return;
            const int flag = state.word(kWaitFlag);
            const bool ok = flag < 0 || state.wait_done_flag(&g.done_flags[flag], flag);
            if (ok) state.arrive(kInputWritten);
        }
    };

    struct Loader {
        __device__ static void run(const RmsNormGlobals& g, State& state) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            const Work work{g, state};
            bool ok = state.wait(kInputWritten, 0);
            ptx::fence_proxy_async_global();  // what the flag promised holds for bulk copies too
            for (int tile = 0; tile < work.tiles; ++tile) {
                ok = state.wait_page(tile) && ok;
                if (lane != 0 || !ok) continue;
                const uint32_t loaded = state.semaphore(kLoaded + tile), bytes = work.bytes(tile);
                const uint32_t page = ptx::smem_address(state.page(tile));
                ptx::mbar_arrive_expect_tx(loaded, bytes);
                ptx::bulk_load(page, work.data(work.layer, tile), bytes, loaded);
            }
            state.pass_pages_from(work.tiles, lane);
        }
    };

    struct Consumer {
        __device__ static void run(const RmsNormGlobals& g, State& state) {
            const int lane = threadIdx.x % mk::kWarpThreads, warp = threadIdx.x / mk::kWarpThreads;
            const Work work{g, state};
            for (int tile = warp / 4; tile < work.tiles; tile += Config::kNumConsumerWarps / 4) {
                state.wait(kLoaded + tile, 0);
                float* rows = reinterpret_cast<float*>(state.page(tile));
                if (warp % 4 < work.rows(tile)) norm(work, rows + warp % 4 * g.num_cols, lane);
                ptx::fence_proxy_async_smem();  // what was written here is what the storer copies
                __syncwarp();
                if (lane == 0) state.arrive(kNormed + tile);
            }
        }
        __device__ static void norm(const Work& work, float* row, int lane) {
            const int cols = work.g.num_cols;
            const float* weight = work.g.weights + work.layer * cols;
            float sum = 0.f;
            for (int c = lane; c < cols; c += mk::kWarpThreads) sum += row[c] * row[c];
            for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            const float scale = rsqrtf(sum / cols + work.g.eps);
            for (int c = lane; c < cols; c += mk::kWarpThreads) row[c] *= scale * weight[c];
        }
    };

    struct Storer {
        __device__ static void run(const RmsNormGlobals& g, State& state) {
            if (threadIdx.x % mk::kWarpThreads != 0) return;
            const Work work{g, state};
            bool ok = true;
            for (int tile = 0; tile < work.tiles; ++tile) {
                ok = state.wait(kNormed + tile, 0) && ok;
                if (ok) store(work.data(work.layer + 1, tile), state.page(tile), work.bytes(tile));
                state.release_page(tile, Config::kPageReleaseArrivals);
            }
            if (!ok || state.word(kRaiseFlag) < 0) return;
            int32_t* flag = g.done_flags + state.word(kRaiseFlag);
            ptx::bulk_wait_written();
            state.raise_done_flag(flag);
        }
        __device__ static void store(float* dst, const void* page, uint32_t bytes) {
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst),
                         "r"(ptx::smem_address(page)),
                         "r"(bytes)
                         : "memory");
            ptx::bulk_commit();
            ptx::bulk_wait_read();  // the page may be reused
        }
    };
};
}  // namespace demo
