// MLA partial: attention of the rows of one row group over a range of its KV
// positions, in tiles of 64.
//
//     loader     Q once, then KV tiles into a ring of pages, each as a left and a right half
//     consumers  two warpgroups; where rows are few (up to 32), see narrow_consumer.cuh, where they
//                are more (up to 64), wide_consumer.cuh
//     launcher   half of the copies, where they are row by row; waits for what is adopted
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
            if (semaphore == Pages::kAdoptedHere) return 1;
            if (semaphore >= Pages::kKvEmpty) return kWarpgroupThreads / mk::kWarpThreads;
            if (semaphore >= Pages::kKvFull && copied_by_lanes(g)) return mk::kWarpThreads;
            return 1;
        }
        __device__ static int released_page(const MlaGlobals&, const int32_t* words, int k) {
            return Pages::released_page(PartialWork::num_tiles_of(words), k);
        }
    };

    struct Loader {
        // Where to look for block ids, if nothing but the words says so, is known before: the KV
        // loader waits when it reads them.
        static constexpr bool kWaitsForEarlierKernels = true;

        __device__ static void run(const MlaGlobals& g, State& state) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            if (g.cu_seqlens_q != nullptr || g.kv_indptr != nullptr) {
                mk::ptx::wait_for_earlier_kernels();
            }
            const PartialWork work(g, state.words());
            with_kv_loader(g, work, lane, [&](auto& kv) {
                if (lane == 0) state.record(mk::TimingWord::kLoadBegin);
                load_q(g, state, work, lane);
                load_tiles(g, state, work, kv, mk::Role::kLoader);
            });
            if (!work.is_shared()) state.pass_pages_from(Pages::kQPages + 2 * work.num_tiles, lane);
            if (lane == 0) state.record(mk::TimingWord::kLoadEnd);
        }

      private:
        // The box may hold rows of the next sequence; nobody looks at what becomes of them.
        __device__ static void load_q(const MlaGlobals& g,
                                      State& state,
                                      const PartialWork& work,
                                      int lane) {
#pragma unroll
            for (int page = 0; page < Pages::kQPages; ++page) state.wait_page(page);
            if (!mk::ptx::elect_lane()) return;
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

    struct Launcher {
        __device__ static void run(const MlaGlobals& g, State& state) {
            if constexpr (!Config::kWholeTileBoxes) {
                const PartialWork work(g, state.words());
                if (copied_by_lanes(g) && 2 * work.num_tiles > Pages::kRing) {
                    RowLoader kv(g, work, threadIdx.x % mk::kWarpThreads);
                    load_tiles(g, state, work, kv, mk::Role::kLauncher);
                }
            }
            if (state.word(PartialWords::kNumMates) > 1) {
                const PartialWork work(g, state.words());
                ClusterMerge<Config>(g, state, work).add_lses();
            }
            const int adopted = state.word(PartialWords::kAdopted) - 1;
            if (adopted < 0 || threadIdx.x % mk::kWarpThreads != 0) return;
            state.wait_done_flag(&g.done_flags[adopted], adopted);
            state.arrive(Pages::kAdoptedHere);
        }
    };

    struct Storer {
        __device__ static void run(const MlaGlobals& g, State& state) {
            if (threadIdx.x % mk::kWarpThreads != 0) return;
            const int dst_batch = state.word(PartialWords::kDstBatch);
            const bool ok = state.wait(Pages::kOutputStored, 0);
            state.record(mk::TimingWord::kStoreBegin);
            if (ok && writes_scratch(dst_batch) && speaks_for_all(g, state)) {
                state.raise_done_flag(&g.done_flags[scratch_slot(dst_batch)]);
            }
            state.record(mk::TimingWord::kStoreEnd);
        }
    };

  private:
    __device__ static bool speaks_for_all(const MlaGlobals& g, const State& state) {
        const PartialWork work(g, state.words());
        return !work.is_shared() || ClusterMerge<Config>(g, state, work).all_stored();
    }

    // Calls load with the way in which this cache's KV is loaded.
    template <class Load>
    __device__ static void with_kv_loader(const MlaGlobals& g,
                                          const PartialWork& work,
                                          int lane,
                                          Load load) {
        const auto make = [&]<class KvLoader>(std::type_identity<KvLoader>) {
            KvLoader kv(g, work, lane);
            load(kv);
        };
        if constexpr (Config::kWholeTileBoxes) {
            make(std::type_identity<BoxLoader<1>>{});
        } else if (g.kv_box_rows > 0) {
            make(std::type_identity<BoxLoader<4>>{});
        } else {
            make(std::type_identity<RowLoader>{});
        }
    }

    __device__ static bool copied_by_lanes(const MlaGlobals& g) {
        return !Config::kWholeTileBoxes && g.kv_box_rows == 0;
    }
    // Copies row by row take two warps. Each has places of its own, because a wait tells phases of
    // a barrier apart only by seeing all of them; pages that come from the instruction before are
    // the loader's to wait for.
    __device__ static bool is_launchers(const MlaGlobals& g, int half_tile) {
        return copied_by_lanes(g) && Pages::place(half_tile) % 2 == 1 &&
               !Pages::is_first_use(half_tile);
    }

    // Loads the half tiles that are this role's, each as soon as its place is free. That is on the
    // way of every tile: what can be known before is.
    template <class KvLoader>
    __device__ static void load_tiles(const MlaGlobals& g,
                                      const State& state,
                                      const PartialWork& work,
                                      KvLoader& kv,
                                      mk::Role role) {
        for (int tile = 0; tile < work.num_tiles; ++tile) {
            kv.begin_tile(tile);
            uint32_t full[2], page[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                full[i] = state.semaphore(Pages::full(2 * tile + i));
                page[i] = mk::ptx::smem_address(state.page(Pages::page(2 * tile + i)));
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int half_tile = 2 * tile + i;
                if (is_launchers(g, half_tile) != (role == mk::Role::kLauncher)) continue;
                kv.load_half(tile, Pages::half(half_tile), page[i], full[i], [&] {
                    return Pages::wait_place(state, half_tile);
                });
            }
            __syncwarp();
        }
    }
};

}  // namespace mla
