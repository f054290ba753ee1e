// MLA partial: attention of the rows of one row group over a range of its KV
// positions, in tiles of 64.
//
//     loader     Q once, then KV tiles into a ring of pages, each as a left and a right half
//     consumers  two warpgroups; where rows are few (up to 32), see narrow_consumer.cuh, where they
//                are more (up to 64), wide_consumer.cuh
//     launcher   brings the first keys to L2; half of the copies, where they are row by row; tells
//                mates what they have to know of rows, or waits for what is adopted
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
            if (semaphore == Pages::kAdoptedHere) return 1;
            if (semaphore >= Pages::kOutputStored) return Config::kNumConsumerWarps;
            if (semaphore >= Pages::kKvEmpty) return kWarpgroupThreads / mk::kWarpThreads;
            if (semaphore >= Pages::kKvFull && copied_by_lanes(g)) return mk::kWarpThreads;
            return 1;
        }
        __device__ static int released_page(const MlaGlobals&, const int32_t* words, int k) {
            return Pages::released_page(PartialWork::num_tiles_of(words), k);
        }
    };

    struct Loader {
        // Where nothing but the words says where block ids lie, these are read before, and read
        // again when the kernels before have ended: see KV loaders.
        static constexpr bool kWaitsForEarlierKernels = true;
        static constexpr bool kStartsFromWords = true;

        __device__ static void run(const MlaGlobals& g, State& state) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            if (g.cu_seqlens_q != nullptr || g.kv_indptr != nullptr) {
                mk::ptx::wait_for_earlier_kernels();
            }
            const PartialWork work(g, state.words());
            with_kv_loader(g, work, lane, [&](auto& kv) {
                const Query q(g, state, work);
                const Tile first(g, state, 0, mk::Role::kLoader);
                if (state.index() == 0) state.wait_decoded();
                q.wait_pages(state);
                kv.begin_tile(0);
                if constexpr (Config::kWholeTileBoxes) {
                    if (state.index() == 0) state.leave_note(kv.place());
                }
                kv.wait_for_earlier_kernels();
                if (lane == 0) state.record(mk::TimingWord::kLoadBegin);
                const auto has_begun = [&] {
                    if (state.index() > 0 || kv.were_right()) {
                        q.tell();
                        return true;
                    }
                    take_back_first_tile(state);
                    kv.begin_tile(0);
                    return false;
                };
                load_tiles(
                    g, state, work, kv, mk::Role::kLoader, first, [&] { q.ask(g); }, has_begun);
            });
            if (!work.is_shared()) state.pass_pages_from(Pages::kQPages + 2 * work.num_tiles, lane);
            if (lane == 0) state.record(mk::TimingWord::kLoadEnd);
        }

      private:
        // The box may hold rows of the next sequence; nobody looks at what becomes of them.
        struct Query {
            uint32_t full, page[Pages::kQPages];
            int row;

            __device__ Query(const MlaGlobals& g, const State& state, const PartialWork& work)
                : full(state.semaphore(Pages::kQFull)), row(work.flat_row(g, 0)) {
#pragma unroll
                for (int i = 0; i < Pages::kQPages; ++i) {
                    page[i] = mk::ptx::smem_address(state.page(i));
                }
            }
            __device__ void wait_pages(const State& state) const {
#pragma unroll
                for (int i = 0; i < Pages::kQPages; ++i) state.wait_page(i);
            }
            // By one lane.
            __device__ void ask(const MlaGlobals& g) const {
                constexpr int kRowBytes = (kLatentDim + kRopeDim) * kElementBytes;
                mk::ptx::mbar_expect_tx(full, g.q_box_rows * kRowBytes);
#pragma unroll
                for (int i = 0; i < Pages::kQPages; ++i) {
                    const uint32_t latent_bytes =
                        g.q_box_rows * (kLatentBlocks / Pages::kQPages) * kBlockRowBytes;
                    mk::ptx::tensor_load_3d(
                        page[i], g.q_latent, full, 0, row, i * kHalfBlocks, mk::ptx::kEvictNormal);
                    mk::ptx::tensor_load_2d(page[i] + latent_bytes,
                                            g.q_rope,
                                            full,
                                            i * kHalfRope,
                                            row,
                                            mk::ptx::kEvictNormal);
                }
            }
            // Consumers begin when Q is there and this has been said.
            __device__ void tell() const {
                if (mk::ptx::elect_lane()) mk::ptx::mbar_arrive(full);
            }
        };

        // Waits for what has been asked for in vain, and makes its mbarriers new. Consumers, who
        // wait for Q first, have not seen them.
        __device__ static void take_back_first_tile(const State& state) {
            if (mk::ptx::elect_lane()) {
#pragma unroll 1
                for (int half_tile = 0; half_tile < 2; ++half_tile) {
                    const uint32_t full = state.semaphore(Pages::full(half_tile));
                    state.wait(Pages::full(half_tile), 0);
                    mk::ptx::mbar_invalidate(full);
                    mk::ptx::mbar_init(full, 1);
                }
                mk::ptx::fence_mbar_init();
            }
            __syncwarp();
        }
    };

    using Consumer =
        std::conditional_t<Config::kNarrow, NarrowConsumer<Config>, WideConsumer<Config>>;

    struct Launcher {
        static constexpr bool kWaitsForEarlierKernels = true;

        __device__ static void run(const MlaGlobals& g, State& state) {
            // While the kernels before still run keys may not be read. But they may be brought to
            // L2, through which all writes go, by block ids that may be old.
            if constexpr (Config::kWholeTileBoxes) {
                if (state.index() == 0) bring_to_l2(g, state.template read_note<BoxPlace>());
            }
            mk::ptx::wait_for_earlier_kernels();
            if constexpr (!Config::kWholeTileBoxes) {
                const PartialWork work(g, state.words());
                if (copied_by_lanes(g) && 2 * work.num_tiles > Pages::kRing) {
                    RowLoader kv(g, work, threadIdx.x % mk::kWarpThreads);
                    kv.begin_tile(0);
                    const Tile first(g, state, 0, mk::Role::kLauncher);
                    load_tiles(
                        g, state, work, kv, mk::Role::kLauncher, first, [] {}, [] { return true; });
                }
            }
            if (state.word(PartialWords::kNumMates) > 1) {
                tell_mates(g, state);
            }
            const int adopted = state.word(PartialWords::kAdopted) - 1;
            if (adopted < 0 || threadIdx.x % mk::kWarpThreads != 0) return;
            state.wait_done_flag(&g.done_flags[adopted], adopted);
            state.arrive(Pages::kAdoptedHere);
        }

      private:
        __device__ static void tell_mates(const MlaGlobals& g, const State& state) {
            const PartialWork work(g, state.words());
            using Mates = ClusterMerge<Config>;
            const Mates mates(g, state, work);
            state.wait(Pages::kSumsPublished, 0);
            // Nobody reads Q any more when there is P of all tiles.
            if (Mates::kInboxWhereQWas) mates.open_inbox();
            const RowNotes notes = Consumer::find_lses(state, work.num_rows);
            state.wait(Pages::kResultReady, 0);
            // Where keys were.
            if (!Mates::kInboxWhereQWas) mates.open_inbox();
            mates.wait_open();
            mates.send_notes(notes);
            mates.weigh();
        }
    };

    struct Storer {
        __device__ static void run(const MlaGlobals& g, State& state) {
            if (threadIdx.x % mk::kWarpThreads != 0) return;
            const int dst_batch = state.word(PartialWords::kDstBatch);
            // Nobody waits for rows of the output: a role less to wake before the CTA can leave.
            if (!Config::kTimings && !writes_scratch(dst_batch)) return;
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

    // A half tile that is to be loaded.
    struct HalfTile {
        int which;
        uint32_t page, full;
        uint32_t empty, empty_phase;  // its place is free when that phase of this mbarrier is over
        bool is_own;                  // this role's to load

        HalfTile() = default;
        __device__ HalfTile(const MlaGlobals& g,
                            const State& state,
                            uint32_t half_tile,
                            mk::Role role)
            : which(Pages::half(half_tile)),
              page(mk::ptx::smem_address(state.page(Pages::page(half_tile)))),
              full(state.semaphore(Pages::full(half_tile))),
              is_own(is_launchers(g, half_tile) == (role == mk::Role::kLauncher)) {
            const auto [mbar, phase] = Pages::place_free(state, half_tile);
            empty = mbar;
            empty_phase = phase;
        }
        __device__ bool wait_place(const State& state) const {
            return state.wait_local(empty, empty_phase);
        }
    };
    // Its halves in the order in which they are asked for. What is known of them is looked up
    // ahead, but for the kernels whose loaders have no registers for it.
    class Tile {
      public:
        int index;
        mk::Role role;

        __device__ Tile(const MlaGlobals& g, const State& state, int index, mk::Role role)
            : index(index), role(role) {
            if constexpr (Config::kWholeTileBoxes) {
#pragma unroll
                for (int i = 0; i < 2; ++i) half_[i] = look_up(g, state, i);
            }
        }
        __device__ HalfTile half(const MlaGlobals& g, const State& state, int i) const {
            if constexpr (Config::kWholeTileBoxes) return half_[i];
            return look_up(g, state, i);
        }

      private:
        __device__ HalfTile look_up(const MlaGlobals& g, const State& state, int i) const {
            return HalfTile(g, state, 2u * index + i, role);
        }

        HalfTile half_[2];
    };

    // Loads what is this role's of all tiles, each half as soon as its place is free. That is on
    // the way of every tile: what can be known before is. `begin` is called by one lane before the
    // first tile is asked for. `has_begun` is called when it has been, and may say that all of that
    // has to be done again.
    template <class KvLoader, class Begin, class HasBegun>
    __device__ static void load_tiles(const MlaGlobals& g,
                                      const State& state,
                                      const PartialWork& work,
                                      KvLoader& kv,
                                      mk::Role role,
                                      Tile tile,
                                      Begin begin,
                                      HasBegun has_begun) {
        for (;;) {
            kv.load(state, tile, begin);
            __syncwarp();
            if (tile.index == 0) {
                if (!has_begun()) continue;
                kv.look_ahead(0);
            }
            const int next = tile.index + 1;
            if (next == work.num_tiles) return;
            kv.begin_tile(next);
            tile = Tile(g, state, next, role);
        }
    }
};

}  // namespace mla
