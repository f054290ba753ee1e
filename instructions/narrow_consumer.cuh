// The consumers of a partial of up to 32 rows: rows are the wgmma's N, see
// narrow_fragments.cuh.
//
// Two warpgroups, each with tiles of its own: one takes the even ones, one the odd ones, and they
// meet at the end only. Then each writes half the latent columns, having been given the other's.
#pragma once

#include "instructions/cluster_merge.cuh"
#include "instructions/epilogue.cuh"
#include "instructions/narrow_softmax.cuh"
#include "instructions/partial_work.cuh"
#include "megakernel/state.cuh"

namespace mla {

template <class Config>
struct NarrowConsumer {
    using State = mk::State<Config>;
    using Element = typename Config::Element;
    using Pages = PartialPages<Config>;
    static constexpr int kQPage = 0;

    __device__ static void run(const MlaGlobals& g, State& state) {
        NarrowOutput o;
#pragma unroll
        for (NarrowBlock& block : o.block) kittens::zero(block);
        NarrowState rows(PartialWork(g, state.words()).num_rows);
        attend(g, state, o, rows);
        finish(g, state, o, rows);
    }

  private:
    static constexpr int kGroups = kNarrowTilesAtOnce;  // warpgroups

    struct Scratch {
        union {
            NarrowPTile<Element> p[kGroups];
            // In the end:
            float lse_log2[kNarrowRows];  // for the mates
            float adopted[kNarrowRows];   // weights of the other partial
        };
        NarrowExchange exchange[kGroups];
        union {
            int visible[kGroups][kNarrowRows];   // positions from the start on
            float factor[kGroups][kNarrowRows];  // of a warpgroup's output, in the end
        };
        float max[kGroups][kNarrowRows];
    };
    static_assert(sizeof(Scratch) <= Config::kScratchBytes);

    __device__ static Scratch& scratch(const State& state) {
        return *reinterpret_cast<Scratch*>(state.scratch());
    }
    __device__ static uint32_t page_address(const State& state, int logical) {
        return mk::ptx::smem_address(state.page(logical));
    }
    // For whole warps.
    __device__ static int group() {
        return __shfl_sync(~0u, mk::ptx::thread_in_cta() / kWarpgroupThreads, 0);
    }
    __device__ static void sync_warpgroup() {
        mk::ptx::named_barrier_sync(warpgroup_barrier(group()), kWarpgroupThreads);
    }

    // ---- the tiles ------------------------------------------------------------------

    // Registers are what this code is short of: words are read again where they are needed.
    __device__ static void attend(const MlaGlobals& g,
                                  State& state,
                                  NarrowOutput& o,
                                  NarrowState& rows) {
        const PartialWork work(g, state.words());
        note_visible(g, state, work);
        const int num_tiles = work.num_tiles, plain_tiles = work.num_plain_tiles(g);
        state.wait(Pages::kQFull, 0);
        if (threadIdx.x == 0) state.record(mk::TimingWord::kComputeBegin);
        const NarrowQ q(page_address(state, kQPage), g.q_box_rows);
        for (int tile = group(); tile < num_tiles; tile += kGroups) {
            NarrowScores s;
            score(g, state, s, q, tile);
            if (tile >= plain_tiles) {
                const typename Pages::Tail tail(work.num_positions());
                const int first = work.is_last(tile) ? tail.first : 0;
                hide_outside(s, scratch(state).visible[group()], first, tile * kKvTile);
                if (work.is_last(tile)) clear_past_end(state, tile, tail.past_end);
            }
            absorb(g, state, s, o, rows);
            add_products(state, o, tile);
        }
    }

    __device__ static void note_visible(const MlaGlobals& g,
                                        const State& state,
                                        const PartialWork& work) {
        const int row = mk::ptx::thread_in_cta() % kWarpgroupThreads;
        if (row < kNarrowRows) {
            scratch(state).visible[group()][row] = work.visible(g, row) - work.start;
        }
        sync_warpgroup();
    }

    __device__ static void score(
        const MlaGlobals& g, const State& state, NarrowScores& s, const NarrowQ& q, int tile) {
        const int left = 2 * tile, right = left + 1;
        const uint32_t k_left = page_address(state, Pages::page(left));
        const uint32_t k_right = page_address(state, Pages::page(right));
        Pages::wait_half(g, state, left);
        multiply_scores<Element, true>(s, q, k_left);
        Pages::wait_half(g, state, right);
        multiply_scores<Element, false>(s, q, k_right);
        kittens::warpgroup::mma_commit_group();
        kittens::warpgroup::mma_async_wait();
    }

    // V rows of the last tile past the end meet P = 0, but NaN * 0 is NaN: they become 0.
    __device__ static void clear_past_end(const State& state, int tile, int past_end) {
        if (past_end == kKvTile) return;
        clear_rows(page_address(state, Pages::page(2 * tile)), past_end);
        clear_rows(page_address(state, Pages::page(2 * tile + 1)), past_end);
    }

    // Scores become P in scratch. The vote comes after all four warps have read the last P.
    __device__ static void absorb(const MlaGlobals& g,
                                  const State& state,
                                  NarrowScores& s,
                                  NarrowOutput& o,
                                  NarrowState& rows) {
        Scratch& shared = scratch(state);
        const bool exceeded = rows.is_exceeded(s, g.scale_log2);
        if (mk::ptx::named_barrier_any(warpgroup_barrier(group()), kWarpgroupThreads, exceeded)) {
            rows.raise_max(s, o, g.scale_log2, shared.exchange[group()], [] { sync_warpgroup(); });
        }
        rows.weigh(s, shared.p[group()], g.scale_log2);
        mk::ptx::fence_proxy_async_smem();
        sync_warpgroup();
    }

    __device__ static void add_products(const State& state, NarrowOutput& o, int tile) {
        const NarrowPTile<Element>& p = scratch(state).p[group()];
        const int own = 2 * tile + group(), other = 2 * tile + (1 - group());
        accumulate<Element, 0>(o, p, page_address(state, Pages::page(own)));
        accumulate<Element, kHalfBlocks>(o, p, page_address(state, Pages::page(other)));
        kittens::warpgroup::mma_commit_group();
        const int num_tiles_kept = PartialWork::num_tiles_kept(state.words());
        const uint32_t emptied[2] = {Pages::emptied(state, 2 * tile, num_tiles_kept),
                                     Pages::emptied(state, 2 * tile + 1, num_tiles_kept)};
        const bool arrives = is_first_lane();
        kittens::warpgroup::mma_async_wait();
        if (!arrives) return;
        for (const uint32_t mbar : emptied) mk::ptx::mbar_arrive(mbar);
    }

    // ---- the end --------------------------------------------------------------------

    __device__ static void finish(const MlaGlobals& g,
                                  State& state,
                                  NarrowOutput& o,
                                  NarrowState& rows) {
        const PartialWork work(g, state.words());
        Scratch& shared = scratch(state);
        rows.publish_sums(shared.exchange[group()], shared.max[group()]);
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        // Nobody reads Q any more: its page is for the output now.
        if (work.is_shared() && mk::ptx::thread_in_cta() < mk::kWarpThreads) {
            ClusterMerge<Config>(g, state, work).open_inbox();
        }
        finish_rows(g, state, work);
        merge(state, o, work.num_rows);
        if (work.adopts()) add_adopted(g, state, o, work);
        if (mk::ptx::as_written(!work.is_shared())) {
            store_output(g, state, o, work);
        } else {
            merge_with_mates(g, state, o);
        }

        mk::ptx::fence_proxy_async_smem();
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        const bool first_lane = is_first_lane();
        if (group() == 0 && first_lane) state.release_page(kQPage, 1);
        if (mk::ptx::thread_in_cta() == 0) {
            state.record(mk::TimingWord::kComputeEnd);
            if (work.is_shared()) Pages::release_ring(state);
        }
        if (first_lane) state.arrive(Pages::kOutputStored);
    }

    __device__ static void merge_with_mates(const MlaGlobals& g,
                                            const State& state,
                                            NarrowOutput& o) {
        const PartialWork work(g, state.words());
        const ClusterMerge<Config> mates(g, state, work);
        mates.wait_open();
        static_assert(kNarrowRows * mk::kMaxClusterCtas == kConsumerThreads);
        const int row = mk::ptx::thread_in_cta() % kNarrowRows;
        const int mate = mk::ptx::thread_in_cta() / kNarrowRows;
        if (row < work.num_rows && mate < work.num_mates) {
            mates.send_lse(row, mate, scratch(state).lse_log2[row]);
        }
        store<float>(state, o, work.num_rows, [&](int col) { return mates.sender(col); });
        mates.merge();
    }

    // A thread of each warpgroup for every row: the first one's looks after the weights, the second
    // one's after the LSE.
    __device__ static void finish_rows(const MlaGlobals& g,
                                       const State& state,
                                       const PartialWork& work) {
        const int row = mk::ptx::thread_in_cta() % kWarpgroupThreads;
        if (row >= work.num_rows) return;
        Scratch& shared = scratch(state);
        float top = fmaxf(shared.max[0][row], shared.max[1][row]);
        float adopted_lse_log2 = -INFINITY;
        if (work.adopts()) {
            state.wait(Pages::kAdoptedHere, 0);
            adopted_lse_log2 = __ldcg(&g.lse_log2_scratch[g.scratch_row(work.adopted, row)]);
            top = fmaxf(top, adopted_lse_log2);
        }
        const float adopted = mk::ptx::exp2_approx(adopted_lse_log2 - top);
        float factor[kGroups], total = adopted;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            factor[group] = mk::ptx::exp2_approx(shared.max[group][row] - top);
            float sum = 0.f;
#pragma unroll
            for (int warp = 0; warp < 4; ++warp) sum += shared.exchange[group].of_warp[warp][row];
            total += factor[group] * sum;
        }
        const bool seen = total > 0.f;
        if (mk::ptx::thread_in_cta() >= kWarpgroupThreads) {
            const float lse_log2 = seen ? top + __log2f(total) : -INFINITY;
            if (work.is_shared()) {
                shared.lse_log2[row] = lse_log2;
            } else {
                work.store_lse(g, row, lse_log2);
            }
            return;
        }
        if (g.attn_sink != nullptr && !work.is_shared()) {
            total += mk::ptx::exp2_approx(work.sink_log2(g, row) - top);
        }
        const float inverse = seen ? mk::ptx::reciprocal_approx(total) : 0.f;
        shared.factor[0][row] = factor[0] * inverse;
        shared.factor[1][row] = factor[1] * inverse;
        if (work.adopts()) shared.adopted[row] = adopted * inverse;
    }

    // The warpgroup's columns of another partial's result.
    __device__ static void add_adopted(const MlaGlobals& g,
                                       const State& state,
                                       NarrowOutput& o,
                                       const PartialWork& work) {
        const float* from = g.o_scratch + g.scratch_row(work.adopted, 0) * kLatentDim +
                            group() * kHalfLatent + fragment_row();
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) {
            const int row = thread_row(r);
            if (row >= work.num_rows) continue;
            const float weight = scratch(state).adopted[row];
#pragma unroll
            for (int i = 0; i < 2 * kHalfBlocks; ++i) {
                element(o.block[i / 2], r, i % 2) +=
                    weight * __ldcg(&from[row * kLatentDim + i / 2 * kBlockCols + i % 2 * 8]);
            }
        }
    }

    // The warpgroups give each other the columns that they do not write, thread by thread: sixteen
    // rows at a time, which fill the page. Leaves the output in the first half of the blocks.
    static constexpr int kThreadPairs = kThreadRows / 2;
    static constexpr int kRowsAtOnce = 16;
    __device__ static void merge(const State& state, NarrowOutput& o, int num_rows) {
        constexpr int kPairs = kRowsAtOnce / 8;              // of a thread's rows
        constexpr int kGroupVectors = kHalfBlocks * kPairs;  // of four floats, per thread
        constexpr uint32_t kStep = kWarpgroupThreads * sizeof(float4);
        static_assert(kGroups * kGroupVectors * kStep <= Config::kSmemPageBytes);
        const uint32_t page =
            page_address(state, kQPage) +
            mk::ptx::thread_in_cta() % kWarpgroupThreads * static_cast<uint32_t>(sizeof(float4));
        const uint32_t given = page + group() * kGroupVectors * kStep;
        const uint32_t taken = page + (1 - group()) * kGroupVectors * kStep;
#pragma unroll
        for (int first = 0; first < kThreadPairs; first += kPairs) {
            if (first * 8 >= num_rows) break;
            if (first > 0) barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
#pragma unroll
            for (int i = 0; i < kGroupVectors; ++i) {
                mk::ptx::store_smem_float4(
                    given + i * kStep, four(o.block[kHalfBlocks + i / kPairs], first + i % kPairs));
            }
            barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
#pragma unroll
            for (int pair = first; pair < first + kPairs; ++pair) {
                const int row = thread_row(2 * pair);
                const auto& factor = scratch(state).factor;
                const auto own = *reinterpret_cast<const float2*>(&factor[group()][row]);
                const auto others = *reinterpret_cast<const float2*>(&factor[1 - group()][row]);
#pragma unroll
                for (int block = 0; block < kHalfBlocks; ++block) {
                    add_weighted(
                        o.block[block],
                        pair,
                        own,
                        mk::ptx::load_smem_float4(taken + (block * kPairs + pair - first) * kStep),
                        others);
                }
            }
        }
    }

    // Of a pair of a thread's rows: the upper elements of both, then the lower ones.
    __device__ static float4 four(NarrowBlock& block, int pair) {
        return {element(block, 2 * pair, 0),
                element(block, 2 * pair + 1, 0),
                element(block, 2 * pair, 1),
                element(block, 2 * pair + 1, 1)};
    }
    __device__ static void add_weighted(
        NarrowBlock& block, int pair, float2 weight, const float4& others, float2 others_weight) {
        const auto add = [](float& to, float own, float x, float x_weight) {
            to = to * own + x * x_weight;
        };
        add(element(block, 2 * pair, 0), weight.x, others.x, others_weight.x);
        add(element(block, 2 * pair + 1, 0), weight.y, others.y, others_weight.y);
        add(element(block, 2 * pair, 1), weight.x, others.z, others_weight.x);
        add(element(block, 2 * pair + 1, 1), weight.y, others.w, others_weight.y);
    }

    // A row of a warpgroup's columns, on its way out. The pad keeps the rows that a warp puts down
    // at once in different banks.
    template <class T>
    static constexpr int kStagedRowBytes = kHalfLatent * sizeof(T) + 16;

    // Puts sixteen rows of a warpgroup's columns into shared memory: floats one by one, what is
    // rounded by matrices of eight by eight.
    __device__ static void stage(NarrowOutput& o, int first, uint32_t staged, int pitch, float) {
        const int lane = mk::ptx::thread_in_cta() % mk::kWarpThreads;
        const uint32_t to =
            staged + lane % 4 * 2 * pitch + fragment_row() * static_cast<uint32_t>(sizeof(float));
#pragma unroll
        for (int r = 0; r < kRowsAtOnce / 4; ++r) {
#pragma unroll
            for (int i = 0; i < 2 * kHalfBlocks; ++i) {
                mk::ptx::store_smem_float(
                    to + (r / 2 * 8 + r % 2) * pitch +
                        (i / 2 * kBlockCols + i % 2 * 8) * static_cast<int>(sizeof(float)),
                    element(o.block[i / 2], 2 * first + r, i % 2));
            }
        }
    }
    template <class T>
    __device__ static void stage(NarrowOutput& o, int first, uint32_t staged, int pitch, T) {
        const int lane = mk::ptx::thread_in_cta() % mk::kWarpThreads;
        const int col = fragment_row() / 16 * 16 + lane / 8 % 2 * 8;
        const uint32_t to = staged + (lane / 16 * 8 + lane % 8) * pitch + col * sizeof(T);
#pragma unroll
        for (int block = 0; block < kHalfBlocks; ++block) {
            uint32_t m[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = 2 * (first + i / 2);
                const float2 both = {element(o.block[block], r, i % 2),
                                     element(o.block[block], r + 1, i % 2)};
                m[i] = round_pair(both, T{});
            }
            mk::ptx::store_matrices_transposed(to + block * kBlockCols * sizeof(T), m);
        }
    }

    __device__ static void store_output(const MlaGlobals& g,
                                        const State& state,
                                        NarrowOutput& o,
                                        const PartialWork& work) {
        if (writes_scratch(work.dst_batch)) {
            float* dst = g.o_scratch + g.scratch_row(scratch_slot(work.dst_batch), 0) * kLatentDim;
            store<float>(state, o, work.num_rows, [&](int col) { return row_writer(dst + col); });
        } else {
            Element* dst = reinterpret_cast<Element*>(g.out) +
                           static_cast<int64_t>(work.flat_row(g, 0)) * kLatentDim;
            store<Element>(state, o, work.num_rows, [&](int col) { return row_writer(dst + col); });
        }
    }

    // Gives away this warpgroup's half of the columns, by way of its half of the page, so that
    // whole cache lines leave: way(column)(row, 16 bytes of T).
    template <class T, class Way>
    __device__ static void store(const State& state, NarrowOutput& o, int num_rows, Way way) {
        constexpr int kPitch = kStagedRowBytes<T>;
        static_assert(kGroups * kRowsAtOnce * kPitch <= Config::kSmemPageBytes);
        const int thread = mk::ptx::thread_in_cta() % kWarpgroupThreads;
        const uint32_t staged = page_address(state, kQPage) + group() * kRowsAtOnce * kPitch;
#pragma unroll
        for (int first = 0; first < kThreadPairs; first += kRowsAtOnce / 8) {
            if (first * 8 >= num_rows) break;
            // All have taken what lay there.
            barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
            stage(o, first, staged, kPitch, T{});
            sync_warpgroup();
            constexpr int kVectorsPerRow = kHalfLatent * sizeof(T) / 16;
            constexpr int kTogether = kWarpgroupThreads / kVectorsPerRow;  // rows
            const int row = thread / kVectorsPerRow, vector = thread % kVectorsPerRow;
            const auto put =
                way(group() * kHalfLatent + vector * (16 / static_cast<int>(sizeof(T))));
            constexpr int kInFlight = 4;
#pragma unroll 1
            for (int begin = 0; begin < kRowsAtOnce / kTogether; begin += kInFlight) {
                float4 v[kInFlight];
#pragma unroll
                for (int i = 0; i < kInFlight; ++i) {
                    v[i] = mk::ptx::load_smem_float4(
                        staged + (row + (begin + i) * kTogether) * kPitch + vector * 16);
                }
#pragma unroll
                for (int i = 0; i < kInFlight; ++i) {
                    const int to = first * 8 + row + (begin + i) * kTogether;
                    if (to < num_rows) put(to, v[i]);
                }
            }
        }
    }
};

}  // namespace mla
