// The consumers of a partial of up to 64 rows: two warpgroups that see-saw.
//
// One takes the even tiles, one the odd ones: it scores them and turns the scores into P. But of
// the output each accumulates half the latent columns over all tiles, the left one columns 0-255,
// the right one columns 256-511, so each needs the other's P. A warpgroup's turn:
//
//     score its own half of the tile's columns
//     add P V of the tile before, which is the other's, P from scratch
//     score the other half
//     scores -> P, for itself in registers, for the other in scratch
//     add P V of its own tile, P from registers
//
// The tensor cores work for one while the other is at its softmax. And of the four half tiles in
// the ring each is let go of at a time of its own, a quarter of a turn after the one before, and
// asked for again in that order.
#pragma once

#include "instructions/cluster_merge.cuh"
#include "instructions/epilogue.cuh"
#include "instructions/partial_work.cuh"
#include "instructions/softmax.cuh"
#include "megakernel/state.cuh"

namespace mla {

template <class Config>
class WideConsumer {
    using State = mk::State<Config>;
    using Element = typename Config::Element;
    using Pages = PartialPages<Config>;
    using Mates = ClusterMerge<Config>;

  public:
    static constexpr bool kWaitsForEarlierKernels = true;
    __device__ static void run(const MlaGlobals& g, State& state) {
        if (g.cu_seqlens_q != nullptr) mk::ptx::wait_for_earlier_kernels();
        WideConsumer consumer(g, state);
        consumer.attend();
        consumer.finish();
    }

    // By the launcher, of a partial that mates share, when sums have been published: LSEs. And
    // where the scales will be.
    __device__ static RowNotes find_lses(const State& state, int num_rows) {
        Scratch& shared = *reinterpret_cast<Scratch*>(state.scratch());
        const int lane = mk::ptx::thread_in_cta() % mk::kWarpThreads;
#pragma unroll 1
        for (int row = lane; row < num_rows; row += mk::kWarpThreads) {
            const float sum = shared.sum[0][row] + shared.sum[1][row];
            shared.sum[0][row] = sum > 0.f ? shared.max[row] + __log2f(sum) : -INFINITY;
        }
        __syncwarp();
        return {shared.sum[0], shared.scale_log2[0], shared.scale_log2[1]};
    }

  private:
    static constexpr int kGroups = 2;  // warpgroups

    // Registers are short where tiles come in other ways.
    using Rope = std::conditional_t<Config::kWholeTileBoxes, RopeInRegisters<Element>, RopeInSmem>;

    struct Scratch {
        PTile<Element> p;              // of the tile scored last
        float max[kMaxRows];           // that it is relative to
        float sum[kGroups][kMaxRows];  // in the end, of a warpgroup's own tiles
        union {
            int visible[kGroups][kMaxRows];       // positions from the start on
            float scale_log2[kGroups][kMaxRows];  // in the end, of what a warpgroup has for mates
        };
    };
    static_assert(sizeof(Scratch) <= Config::kScratchBytes);

    // The place of a half tile, which is that of every other tile's: of a tile's columns the
    // warpgroup's half, or the other one.
    struct Half {
        const uint32_t page;
        const int full;  // semaphore
        // On which to arrive when it has been read.
        const uint32_t later_tile, next_instruction;

        __device__ Half(const State& state, int half_tile)
            : page(uniform(mk::ptx::smem_address(state.page(Pages::page(half_tile))))),
              full(Pages::full(half_tile)),
              later_tile(uniform(Pages::empty(state, half_tile))),
              next_instruction(uniform(Pages::free(state, half_tile))) {}
    };

    const MlaGlobals& g;
    const State& state;
    const int group = __shfl_sync(~0u, mk::ptx::thread_in_cta() / kWarpgroupThreads, 0);
    const int row = fragment_row();  // of this thread, and the one eight below
    const int num_tiles;
    const int num_tiles_kept;
    const int plain_tiles;       // leading tiles that every row sees in full
    const Half own, other_half;  // of its own tiles
    const Half others;           // of the other warpgroup's its half
    Accumulator o;
    RowState rows;

    __device__ WideConsumer(const MlaGlobals& g, State& state)
        : g(g),
          state(state),
          num_tiles(PartialWork::num_tiles_of(state.words())),
          num_tiles_kept(PartialWork::num_tiles_kept(state.words())),
          plain_tiles(PartialWork(g, state.words()).num_plain_tiles(g)),
          own(state, Pages::half_tile(group, group)),
          other_half(state, Pages::half_tile(group, 1 - group)),
          others(state, Pages::half_tile(1 - group, group)) {
        note_visible();
        kittens::zero(o);
        state.wait(Pages::kQFull, 0);
        mk::ptx::wait_for_earlier_kernels();
        if (threadIdx.x == 0) state.record(mk::TimingWord::kComputeBegin);
    }

    __device__ Scratch& scratch() const { return *reinterpret_cast<Scratch*>(state.scratch()); }
    __device__ uint32_t page(int logical) const {
        return mk::ptx::smem_address(state.page(logical));
    }

    // Each warp for its own rows.
    __device__ void note_visible() {
        const PartialWork work(g, state.words());
        const int own = row / 16 * 16 + mk::ptx::thread_in_cta() % 16;
        scratch().visible[group][own] = work.visible(g, own) - work.start;
        __syncwarp();
    }

    // ---- the tiles ------------------------------------------------------------------

    __device__ void attend() {
        const HalfQ<Rope> q_own(page(group)), q_other(page(1 - group));
        int tile = group;
        for (; tile < num_tiles; tile += kGroups) {
            Scores s;
            const uint32_t phase = Pages::full_phase(2 * tile);
            state.wait(own.full, phase);
            Pages::see_half(g);
            multiply_scores<Element, true>(s, q_own, HalfK(own.page));
            kittens::warpgroup::mma_commit_group();
            bool holds_others = tile > 0;
            if (holds_others) {
                add_others<false>();
                // Where memory is slow, what is read does not wait for what is still to come.
                if (!state.is_over(other_half.full, phase)) {
                    kittens::warpgroup::mma_async_wait();
                    let_go(others, tile - 1);
                    holds_others = false;
                }
            }
            state.wait(other_half.full, phase);
            Pages::see_half(g);
            multiply_scores<Element, false>(s, q_other, HalfK(other_half.page));
            kittens::warpgroup::mma_commit_group();
            if (holds_others) {
                kittens::warpgroup::mma_async_wait<1>();
                let_go(others, tile - 1);
            }
            kittens::warpgroup::mma_async_wait();
            add_own(s, tile);
        }
        if (tile > num_tiles) return;
        add_others<true>();
        publish_sums();
        kittens::warpgroup::mma_async_wait();
        let_go(others, num_tiles - 1);
    }

    // The other one has written P after it had all of the tile.
    template <bool kLast>
    __device__ void add_others() {
        barrier_sync(p_ready(1 - group), kConsumerThreads);
        Pages::see_half(g);
        if (kLast) clear_past_end(others);
        const Scratch& shared = scratch();
        const float max[2] = {shared.max[row], shared.max[row + 8]};
        if (__any_sync(~0u, max[0] != rows.max[0] || max[1] != rows.max[1])) {
            rows.move_max(max).apply(o);
        }
        accumulate<Element>(o, POperand(mk::ptx::smem_address(&shared.p)), VOperand(others.page));
    }

    // P is written where the other's was: the products with that came before the scores.
    __device__ void add_own(Scores& s, int tile) {
        if (tile >= plain_tiles) {
            const typename Pages::Tail tail(PartialWork::num_positions(state.words()));
            const bool is_last = tile + 1 == num_tiles;
            const int first = is_last ? tail.first : 0, begin = tile * kKvTile - first;
            const auto& visible = scratch().visible[group];
            hide_outside(s, first, {visible[row] - begin, visible[row + 8] - begin});
            if (is_last) clear_past_end(own);
        }
        PFragment<Element> p;
        rows.template absorb<Element>(s, p, o, g.scale_log2);
        // The other warpgroup is told when these stores have landed: until then, one more product.
        put_p(p);
        accumulate<Element>(o, p, VOperand(own.page));
        mk::ptx::fence_proxy_async_smem();
        barrier_arrive(p_ready(group), kConsumerThreads);
        if (tile + 1 == num_tiles) publish_sums();
        kittens::warpgroup::mma_async_wait();
        let_go(own, tile);
    }

    __device__ void put_p(const PFragment<Element>& p) const {
        Scratch& shared = scratch();
        const int lane = mk::ptx::thread_in_cta() % mk::kWarpThreads;
        const int p_row = row / 16 * 16 + lane % 16;
        const uint32_t to = mk::ptx::smem_address(&shared.p) + p_row * kBlockRowBytes +
                            (lane / 16 ^ p_row % kGroupRows) * 16;
#pragma unroll
        for (int i = 0; i < kKvTile / 16; ++i) {
            mk::ptx::store_matrices(to ^ i * 32,
                                    reinterpret_cast<const uint32_t (&)[4]>(p.tiles[0][i].data));
        }
        put_rows(shared.max, rows.max);
    }

    // While the last tile is being added.
    __device__ void publish_sums() {
        rows.sum_up();
        put_rows(scratch().sum[group], rows.sum);
        Pages::tell_of_sums(state, num_tiles_kept > num_tiles, group);
    }
    __device__ void add_others_sums() {
        barrier_sync(sums_ready(1 - group), kConsumerThreads);
        for (int i = 0; i < 2; ++i) rows.sum[i] += scratch().sum[1 - group][row + 8 * i];
    }

    // Of this warpgroup's half of a tile.
    __device__ void let_go(const Half& half, int tile) const {
        const bool comes_again = tile + Pages::kRing / 2 < num_tiles_kept;
        if (!is_first_lane()) return;
        mk::ptx::mbar_arrive(comes_again ? half.later_tile : half.next_instruction);
    }

    // V rows of the last tile past the end meet P = 0, but NaN * 0 is NaN: they become 0.
    __device__ void clear_past_end(const Half& last) const {
        const typename Pages::Tail tail(PartialWork::num_positions(state.words()));
        if (tail.past_end == kKvTile) return;
        clear_rows(last.page, tail.past_end);
        mk::ptx::fence_proxy_async_smem();
        mk::ptx::named_barrier_sync(warpgroup_barrier(group), kWarpgroupThreads);
    }

    __device__ static NamedBarrier p_ready(int group) {
        return group == 0 ? NamedBarrier::kEvenPReady : NamedBarrier::kOddPReady;
    }
    // All four threads of a quad write the same.
    __device__ void put_rows(float* to, const float (&value)[2]) const {
        to[row] = value[0];
        to[row + 8] = value[1];
    }

    // ---- the end --------------------------------------------------------------------

    __device__ void finish() {
        const PartialWork work(g, state.words());
        if (mk::ptx::as_written(!work.is_shared())) {
            add_others_sums();
            if (work.adopts()) adopt(work);
            store_output(work, inverse_sum(work));
            const bool stores = mk::ptx::thread_in_cta() % 4 == 0 && lse_row() < work.num_rows;
            if (stores) work.store_lse(g, lse_row(), lse_log2());
        } else {
            merge_with_mates(work);
        }
        __syncwarp();
        const bool first_lane = is_first_lane();
        if (first_lane) state.arrive(Pages::kOutputStored);
        mk::ptx::fence_proxy_async_smem();
        // Nobody begins the next instruction's scratch before all have read this one's.
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        if (mk::ptx::thread_in_cta() == 0) {
            state.record(mk::TimingWord::kComputeEnd);
            if (work.is_shared()) Pages::release_ring(state);
        }
        if (first_lane) state.release_page(group, 1);
    }

    // Another partial's result counts as one more tile, with sums of 1.
    __device__ void adopt(const PartialWork& work) {
        state.wait(Pages::kAdoptedHere, 0);
        const int64_t first_row = g.scratch_row(work.adopted, 0);
        const float* from = g.o_scratch + first_row * kLatentDim + group * kHalfLatent;
        int at[2];  // of this thread's first columns
        float lse_log2[2], to[2], weight[2];
        for (int i = 0; i < 2; ++i) {
            const int own = min(row + 8 * i, work.num_rows - 1);
            at[i] = own * kLatentDim + mk::ptx::thread_in_cta() % 4 * 2;
            lse_log2[i] = __ldcg(&g.lse_log2_scratch[first_row + own]);
            to[i] = fmaxf(rows.max[i], lse_log2[i]);
        }
        rows.move_max(to).apply(o);
        for (int i = 0; i < 2; ++i) {
            weight[i] = mk::ptx::exp2_approx(lse_log2[i] - to[i]);
            rows.sum[i] += weight[i];
        }
#pragma unroll
        for (int tile = 0; tile < Accumulator::width; ++tile) {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                const float* place = from + at[part % 2] + tile * 16 + part / 2 * 8;
                const auto others = __ldcg(reinterpret_cast<const float2*>(place));
                float2& own = o.tiles[0][tile].data[part];
                own.x += others.x * weight[part % 2];
                own.y += others.y * weight[part % 2];
            }
        }
    }

    __device__ void merge_with_mates(const PartialWork& work) const {
        const Mates mates(g, state, work);
        const HalfRange range[2] = {HalfRange(sum_of_magnitudes(0)),
                                    HalfRange(sum_of_magnitudes(1))};
        put_rows(scratch().scale_log2[group],
                 {rows.max[0] + range[0].log2_inverse, rows.max[1] + range[1].log2_inverse});
        arrive_warp(state, Pages::kResultReady);
        using Columns = Staging<typename Mates::Sent>;
        static_assert(Columns::kCols == kHalfLatent);
        const Columns columns(page(Pages::kQPages + group));  // all keys have been read
        columns.give(o, {{range[0].scale, range[1].scale}}, work.num_rows, [&](int col) {
            mates.wait_open();
            return mates.sender(group * kHalfLatent + col);
        });
        mates.merge([&](int row, int col) {
            return page(Pages::kQPages + col / kHalfLatent) + row * Columns::kPitch +
                   col % kHalfLatent * static_cast<uint32_t>(sizeof(typename Mates::Sent));
        });
    }
    // Of this half of a row of the output: no less than the largest of them.
    __device__ float sum_of_magnitudes(int i) const {
        float sum = 0.f;
#pragma unroll
        for (int tile = 0; tile < Accumulator::width; ++tile) {
#pragma unroll
            for (int part = i; part < 4; part += 2) {
                const float2 pair = o.tiles[0][tile].data[part];
                sum += fabsf(pair.x) + fabsf(pair.y);
            }
        }
        return quad_sum(sum);
    }

    // Nobody reads Q any more: its pages are for the output now.
    __device__ void store_output(const PartialWork& work, const RowScale& scale) const {
        if (writes_scratch(work.dst_batch)) {
            const int slot = scratch_slot(work.dst_batch);
            store_rows(work, scale, g.o_scratch + g.scratch_row(slot, 0) * kLatentDim);
        } else {
            store_rows(work,
                       scale,
                       reinterpret_cast<Element*>(g.out) +
                           static_cast<int64_t>(work.flat_row(g, 0)) * kLatentDim);
        }
    }
    template <class T>
    __device__ void store_rows(const PartialWork& work, const RowScale& scale, T* to) const {
        // Warps without a row of the group have nothing to store.
        if (row / 16 * 16 >= work.num_rows) return;
        to += group * kHalfLatent;
        const auto writer_from = [&](int col) { return row_writer(to + col); };
        Staging<T>(page(group)).give(o, scale, work.num_rows, writer_from);
    }

    __device__ RowScale inverse_sum(const PartialWork& work) const {
        float sink_log2[2] = {-INFINITY, -INFINITY};
        if (g.attn_sink != nullptr) {
            for (int i = 0; i < 2; ++i) {
                sink_log2[i] = work.sink_log2(g, min(row + 8 * i, work.num_rows - 1));
            }
        }
        return rows.inverse_sum(sink_log2);
    }

    // Each warpgroup looks after the LSE of one of a thread's two rows.
    __device__ int lse_row() const { return row + 8 * group; }
    __device__ float lse_log2() const { return group == 0 ? rows.lse_log2(0) : rows.lse_log2(1); }
};

}  // namespace mla
