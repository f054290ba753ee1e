// MLA partial: attention of the rows of one row group over a range of its KV
// positions, in tiles of 64.
//
//     loader     Q once, then KV tiles into a ring of pages, each as a left and a right half
//     consumers  two warpgroups, see wide_consumer.cuh (up to 64 rows) and narrow_consumer.cuh (up
//                to 32)
//     storer     raises the flag of the scratch slot that the consumers have written
#pragma once

#include "instructions/kv_loader.cuh"
#include "instructions/narrow_consumer.cuh"
#include "instructions/wide_consumer.cuh"
#include "megakernel/opcode_list.cuh"
#include "megakernel/state.cuh"

namespace mla {

template <class Config>
struct MlaPartial {
    static constexpr int kOpcode = static_cast<int>(Opcode::kMlaPartial);
    static constexpr mk::Role kPrefetchGate = mk::Role::kLoader;
    using State = mk::State<Config>;
    using Pages = PartialPages<Config>;
    static constexpr int kNumSemaphores = Pages::kNumSemaphores;

    struct Controller {
        __device__ static int arrival_count(const MlaGlobals& g, int semaphore) {
            if (semaphore == Pages::kOutputStored) return Config::kNumConsumerWarps;
            if (semaphore >= Pages::kKvEmpty) return kWarpgroupThreads / mk::kWarpThreads;
            const bool copied_by_lanes = semaphore >= Pages::kKvFull && g.kv_box_rows == 0;
            return copied_by_lanes ? mk::kWarpThreads : 1;
        }
        __device__ static int released_page(const MlaGlobals&, const int32_t* words, int k) {
            return Pages::released_page(PartialWork::num_tiles_of(words), k);
        }
    };

    struct Loader {
        __device__ static void run(const MlaGlobals& g, State& state) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            const PartialWork work(g, state.words());
            if (lane == 0) state.record(mk::TimingWord::kLoadBegin);
            if constexpr (Config::kWholeTileBoxes) {
                load<BoxLoader<1>>(g, state, work, lane);
            } else if (g.kv_box_rows == 32) {
                load<BoxLoader<2>>(g, state, work, lane);
            } else if (g.kv_box_rows == 16) {
                load<BoxLoader<4>>(g, state, work, lane);
            } else {
                load<RowLoader>(g, state, work, lane);
            }
            state.pass_pages_from(Pages::kQPages + 2 * work.num_tiles, lane);
            if (lane == 0) state.record(mk::TimingWord::kLoadEnd);
        }

      private:
        template <class KvLoader>
        __device__ static void load(const MlaGlobals& g,
                                    State& state,
                                    const PartialWork& work,
                                    int lane) {
            KvLoader kv(g, work, lane);
            load_q(g, state, work, lane);
            for (int tile = 0; tile < work.num_tiles; ++tile) {
                kv.begin_tile(tile);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int i = 2 * tile + half;
                    const bool ok = i < Pages::kRing ? state.wait_page(Pages::page(i))
                                                     : state.wait(Pages::kKvEmpty + Pages::place(i),
                                                                  i / Pages::kRing - 1);
                    const uint32_t full = state.semaphore(Pages::full(i));
                    const uint32_t page = mk::ptx::smem_address(state.page(Pages::page(i)));
                    if (ok) kv.load_half(tile, half, page, full);
                }
                __syncwarp();
            }
        }

        // The box may hold rows of the next sequence; nobody looks at what becomes of them.
        __device__ static void load_q(const MlaGlobals& g,
                                      State& state,
                                      const PartialWork& work,
                                      int lane) {
#pragma unroll
            for (int page = 0; page < Pages::kQPages; ++page) state.wait_page(page);
            if (lane != 0) return;
            const uint32_t full = state.semaphore(Pages::kQFull);
            const int row = work.flat_row(g, 0);
            constexpr int kRowBytes = (kLatentDim + kRopeDim) * kElementBytes;
            mk::ptx::mbar_arrive_expect_tx(full, g.q_box_rows * kRowBytes);
#pragma unroll
            for (int i = 0; i < Pages::kQPages; ++i) {
                const uint32_t page = mk::ptx::smem_address(state.page(i));
                const uint32_t latent_bytes =
                    g.q_box_rows * (kLatentBlocks / Pages::kQPages) * kBlockRowBytes;
                mk::ptx::tensor_load_3d(
                    page, g.q_latent, full, 0, row, i * kHalfBlocks, mk::ptx::kEvictNormal);
                mk::ptx::tensor_load_2d(
                    page + latent_bytes, g.q_rope, full, i * kHalfRope, row, mk::ptx::kEvictNormal);
            }
        }
    };

    using Consumer =
        std::conditional_t<Config::kNarrow, NarrowConsumer<Config>, WideConsumer<Config>>;

    using Launcher = mk::Idle;

    struct Storer {
        __device__ static void run(const MlaGlobals& g, State& state) {
            if (threadIdx.x % mk::kWarpThreads != 0) return;
            const int dst_batch = state.word(PartialWords::kDstBatch);
            const bool ok = state.wait(Pages::kOutputStored, 0);
            state.record(mk::TimingWord::kStoreBegin);
            if (ok && writes_scratch(dst_batch)) {
                state.raise_done_flag(&g.done_flags[scratch_slot(dst_batch)]);
            }
            state.record(mk::TimingWord::kStoreEnd);
        }
    };
};

}  // namespace mla
