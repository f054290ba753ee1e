// The consumers of a partial of up to 32 rows: rows are the wgmma's N, see
// narrow_fragments.cuh.
//
// Two warpgroups, each with tiles of its own: one takes the even ones, one the odd ones, and they
// meet at the end only. Then each writes half the latent columns, having been given the other's.
#pragma once

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
    static constexpr int kGroups = 2;  // warpgroups

    struct Scratch {
        NarrowPTile<Element> p[kGroups];
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
    __device__ static int barrier_id() {
        return static_cast<int>(NamedBarrier::kWarpgroupSynced) + group();
    }
    __device__ static void sync_warpgroup() {
        mk::ptx::named_barrier_sync(barrier_id(), kWarpgroupThreads);
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
                hide_past(s, scratch(state).visible[group()], tile * kKvTile);
                clear_past_length(state, tile);
            }
            absorb(g, state, s, o, rows);
            add_products(state, o, tile);
            Pages::release_half(state, 2 * tile, num_tiles);
            Pages::release_half(state, 2 * tile + 1, num_tiles);
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
        Pages::wait_half(g, state, left);
        multiply_scores<Element, true>(s, q, page_address(state, Pages::page(left)));
        Pages::wait_half(g, state, right);
        multiply_scores<Element, false>(s, q, page_address(state, Pages::page(right)));
        kittens::warpgroup::mma_commit_group();
        kittens::warpgroup::mma_async_wait();
    }

    // V rows past the request's length meet P = 0, but NaN * 0 is NaN: they become 0.
    __device__ static void clear_past_length(const State& state, int tile) {
        const int valid =
            state.word(PartialWords::kLength) - state.word(PartialWords::kStart) - tile * kKvTile;
        if (valid >= kKvTile) return;
        sync_warpgroup();  // all have read K
        clear_rows(page_address(state, Pages::page(2 * tile)), valid);
        clear_rows(page_address(state, Pages::page(2 * tile + 1)), valid);
    }

    // Scores become P in scratch. The vote comes after all four warps have read the last P.
    __device__ static void absorb(const MlaGlobals& g,
                                  const State& state,
                                  NarrowScores& s,
                                  NarrowOutput& o,
                                  NarrowState& rows) {
        Scratch& shared = scratch(state);
        const bool exceeded = rows.is_exceeded(s, g.scale_log2);
        if (mk::ptx::named_barrier_any(barrier_id(), kWarpgroupThreads, exceeded)) {
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
        kittens::warpgroup::mma_async_wait();
    }

    // ---- the end --------------------------------------------------------------------

    __device__ static void finish(const MlaGlobals& g,
                                  State& state,
                                  NarrowOutput& o,
                                  NarrowState& rows) {
        const PartialWork work(g, state.words());
        Scratch& shared = scratch(state);
#pragma unroll
        for (float& sum : rows.sum.of) {
            sum = across_positions(sum, [](float x, float y) { return x + y; });
        }
        publish(shared.exchange[group()], rows.sum);
        publish_max(shared.max[group()], rows.max);
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        if (mk::ptx::thread_in_cta() < kNarrowRows) weigh_groups(g, state, work);
        merge(state, o, work.num_rows);

        // The other's columns have been read: Q's page goes to the next instruction.
        mk::ptx::fence_proxy_async_smem();
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        const bool first_lane = mk::ptx::thread_in_cta() % mk::kWarpThreads == 0;
        if (group() == 0 && first_lane) state.release_page(kQPage, 1);
        store(g, work, o);
        if (mk::ptx::thread_in_cta() == 0) state.record(mk::TimingWord::kComputeEnd);
        __syncwarp();
        if (first_lane) state.arrive(Pages::kOutputStored);
    }

    __device__ static void publish_max(float* to, const NarrowRow& max) {
        if (mk::ptx::thread_in_cta() % kWarpgroupThreads >= 4) return;
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) to[thread_row(r)] = max.of[r];
    }

    // A row's LSE, and what each warpgroup's output counts in it. One thread per row.
    __device__ static void weigh_groups(const MlaGlobals& g,
                                        const State& state,
                                        const PartialWork& work) {
        Scratch& shared = scratch(state);
        const int row = mk::ptx::thread_in_cta();
        if (row >= work.num_rows) return;
        const float top = fmaxf(shared.max[0][row], shared.max[1][row]);
        float factor[kGroups], total = 0.f;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            factor[group] = mk::ptx::exp2_approx(shared.max[group][row] - RowState::finite(top));
            float sum = 0.f;
#pragma unroll
            for (int warp = 0; warp < 4; ++warp) sum += shared.exchange[group].of_warp[warp][row];
            total += factor[group] * sum;
        }
        const float lse_log2 = total > 0.f ? top + __log2f(total) : -INFINITY;
        if (writes_scratch(work.dst_batch)) {
            g.lse_log2_scratch[g.scratch_row(scratch_slot(work.dst_batch), row)] = lse_log2;
        } else {
            const int flat = work.flat_row(g, row);
            const int token = flat / g.num_heads, head = flat % g.num_heads;
            g.store_lse(token, head, lse_log2);
            if (total > 0.f) total += mk::ptx::exp2_approx(g.sink_log2(token, head) - top);
        }
        const float inverse = total > 0.f ? 1.f / total : 0.f;
        shared.factor[0][row] = factor[0] * inverse;
        shared.factor[1][row] = factor[1] * inverse;
    }

    // The warpgroups give each other the columns that they do not write, by way of Q's page, thread
    // by thread and in two rounds. Leaves the output in the first half of the blocks.
    __device__ static void merge(const State& state, NarrowOutput& o, int num_rows) {
        constexpr int kRounds = 2, kAtOnce = kHalfBlocks / kRounds;
        constexpr int kGroupVectors = kAtOnce * kThreadPairs;  // of four floats, per thread
        static_assert(kGroups * kGroupVectors * kWarpgroupThreads * sizeof(float4) <=
                      Config::kSmemPageBytes);
        const int thread = mk::ptx::thread_in_cta() % kWarpgroupThreads;
        const uint32_t page = page_address(state, kQPage) + thread * sizeof(float4);
        constexpr uint32_t kStep = kWarpgroupThreads * sizeof(float4);
        const uint32_t given = page + group() * kGroupVectors * kStep;
        const uint32_t taken = page + (1 - group()) * kGroupVectors * kStep;
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            if (round > 0) barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
#pragma unroll
            for (int i = 0; i < kGroupVectors; ++i) {
                const int pair = i % kThreadPairs;
                if (pair * 8 >= num_rows) continue;
                const int block = kHalfBlocks + round * kAtOnce + i / kThreadPairs;
                mk::ptx::store_smem_float4(given + i * kStep, four(o.block[block], pair));
            }
            barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
#pragma unroll
            for (int i = 0; i < kGroupVectors; ++i) {
                const int pair = i % kThreadPairs;
                if (pair * 8 >= num_rows) continue;
                add_weighted(state,
                             o.block[round * kAtOnce + i / kThreadPairs],
                             pair,
                             mk::ptx::load_smem_float4(taken + i * kStep));
            }
        }
    }

    // Of a pair of a thread's rows: the upper elements of both, then the lower ones.
    static constexpr int kThreadPairs = kThreadRows / 2;
    __device__ static float4 four(NarrowBlock& block, int pair) {
        return {element(block, 2 * pair, 0),
                element(block, 2 * pair + 1, 0),
                element(block, 2 * pair, 1),
                element(block, 2 * pair + 1, 1)};
    }
    __device__ static void add_weighted(const State& state,
                                        NarrowBlock& block,
                                        int pair,
                                        const float4& others) {
        const auto& factor = scratch(state).factor;
        const auto own_factor =
            *reinterpret_cast<const float2*>(&factor[group()][thread_row(2 * pair)]);
        const auto others_factor =
            *reinterpret_cast<const float2*>(&factor[1 - group()][thread_row(2 * pair)]);
        const auto add = [](float& to, float weight, float x, float x_weight) {
            to = to * weight + x * x_weight;
        };
        add(element(block, 2 * pair, 0), own_factor.x, others.x, others_factor.x);
        add(element(block, 2 * pair + 1, 0), own_factor.y, others.y, others_factor.y);
        add(element(block, 2 * pair, 1), own_factor.x, others.z, others_factor.x);
        add(element(block, 2 * pair + 1, 1), own_factor.y, others.w, others_factor.y);
    }

    // Writes this warpgroup's half of the columns.
    __device__ static void store(const MlaGlobals& g, const PartialWork& work, NarrowOutput& o) {
        const int warp_col = group() * kHalfLatent + fragment_row() / 16 * 16;
        const int lane = mk::ptx::thread_in_cta() % mk::kWarpThreads;
        if (writes_scratch(work.dst_batch)) {
            const int64_t row = g.scratch_row(scratch_slot(work.dst_batch), 0);
            float* dst = g.o_scratch + row * kLatentDim + warp_col + lane / 4;
            store_floats(dst + lane % 4 * 2 * kLatentDim, work.num_rows - lane % 4 * 2, o);
        } else {
            Element* dst = reinterpret_cast<Element*>(g.out) +
                           static_cast<int64_t>(work.flat_row(g, 0)) * kLatentDim;
            dst += warp_col + lane / 4 * kLatentDim + lane % 4 * 2;
            store_rounded(dst, work.num_rows - lane / 4, o);
        }
    }

    // `dst`: column `lane / 4` of the thread's first row, which has num_rows from it on.
    __device__ static void store_floats(float* dst, int num_rows, NarrowOutput& o) {
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) {
            const int row = r / 2 * 8 + r % 2;
            if (row >= num_rows) break;
#pragma unroll
            for (int i = 0; i < 2 * kHalfBlocks; ++i) {
                dst[row * kLatentDim + i / 2 * kBlockCols + i % 2 * 8] =
                    element(o.block[i / 2], r, i % 2);
            }
        }
    }

    // Transposed by eights: `dst` is columns 2 (lane % 4) and the next of row lane / 4.
    __device__ static void store_rounded(Element* dst, int num_rows, NarrowOutput& o) {
#pragma unroll
        for (int pair = 0; pair < kThreadPairs; ++pair) {
#pragma unroll
            for (int i = 0; i < 2 * kHalfBlocks; ++i) {
                NarrowBlock& block = o.block[i / 2];
                const float2 both = {element(block, 2 * pair, i % 2),
                                     element(block, 2 * pair + 1, i % 2)};
                const uint32_t columns = mk::ptx::transpose_matrix(round_pair(both, Element{}));
                if (pair * 8 < num_rows) {
                    *reinterpret_cast<uint32_t*>(dst + pair * 8 * kLatentDim + i / 2 * kBlockCols +
                                                 i % 2 * 8) = columns;
                }
            }
        }
    }
};

}  // namespace mla
