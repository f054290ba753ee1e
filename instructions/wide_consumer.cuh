// The consumers of a partial of up to 64 rows: see wide_exchange.cuh.
#pragma once

#include "instructions/epilogue.cuh"
#include "instructions/wide_exchange.cuh"

namespace mla {

template <class Config>
class WideConsumer {
    using State = mk::State<Config>;
    using Element = typename Config::Element;
    using Pages = PartialPages<Config>;
    using Exchange = WideExchange<Config>;

  public:
    __device__ static void run(const MlaGlobals& g, State& state) {
        // What lay in scratch is no longer wanted: the scorers may write there.
        if (is_first_lane()) state.arrive(Pages::kScratchFree);
        Accumulator o;
        for (auto& part : o.part) kittens::zero(part);
        accumulate_tiles(g, state, o);
        const RowScale inverse = scale_of(Exchange::of(state).inverse, fragment_row());
        store(g, state, o, inverse);
        mk::ptx::fence_proxy_async_smem();
        __syncwarp();
        if (is_first_lane()) state.release_page(half(), 1);
        if (mk::ptx::thread_in_cta() == 0) state.record(mk::TimingWord::kComputeEnd);
        if (is_first_lane()) state.arrive(Pages::kOutputStored);
    }

  private:
    // Which half of the latent columns.
    __device__ static int half() { return mk::ptx::thread_in_cta() / kWarpgroupThreads; }
    // Shared-memory address of this warpgroup's half of a tile.
    __device__ static uint32_t half_page(const State& state, int tile) {
        return mk::ptx::smem_address(state.page(Pages::page(2 * tile + half())));
    }
    __device__ static RowScale scale_of(const float* of_row, int row) {
        return {of_row[row], of_row[row + 8]};
    }

    __device__ static void accumulate_tiles(const MlaGlobals& g,
                                            const State& state,
                                            Accumulator& o) {
        const Exchange& exchange = Exchange::of(state);
        const POperand p(mk::ptx::smem_address(&exchange.p));
        const int num_tiles = PartialWork::num_tiles_of(state.words());
        const int row = fragment_row();
        for (int tile = 0;; ++tile) {
            // What can be known before a wait is: what comes after is on the way of every tile.
            const VOperand v(half_page(state, tile));
            const uint32_t emptied = Pages::emptied(state, 2 * tile + half(), num_tiles);
            const bool arrives = is_first_lane();
            clear_past_length(g, state, tile);
            barrier_sync(NamedBarrier::kPReady, kWideThreads);
            Pages::see_half(g);
            scale_of(exchange.scale, row).apply(o);
            accumulate<Element>(o, p, v);
            kittens::warpgroup::mma_async_wait();
            if (arrives) mk::ptx::mbar_arrive(emptied);
            if (tile + 1 == num_tiles) break;
            barrier_arrive(NamedBarrier::kPFree, kWideThreads);
        }
        barrier_sync(NamedBarrier::kSumsReady, kWideThreads);
    }

    // V rows past the request's length meet P = 0, but NaN * 0 is NaN: they become 0.
    __device__ static void clear_past_length(const MlaGlobals& g, const State& state, int tile) {
        const int valid =
            state.word(PartialWords::kLength) - state.word(PartialWords::kStart) - tile * kKvTile;
        if (valid >= kKvTile) return;
        // The tile before was there, or it would have had no P: this phase is the next one to end.
        Pages::wait_half(g, state, 2 * tile + half());
        clear_rows(half_page(state, tile), valid);
        mk::ptx::fence_proxy_async_smem();
        mk::ptx::named_barrier_sync(warpgroup_barrier(half()), kWarpgroupThreads);
    }

    // By way of Q's pages: nothing reads Q after the scores of the last tile.
    __device__ static void store(const MlaGlobals& g,
                                 const State& state,
                                 const Accumulator& o,
                                 const RowScale& inverse) {
        const PartialWork work(g, state.words());
        // Warps without a row of the group have nothing to store.
        if (fragment_row() / 16 * 16 >= work.num_rows) return;
        const uint32_t page = mk::ptx::smem_address(state.page(half()));
        const int first_col = half() * kHalfLatent;
        if (writes_scratch(work.dst_batch)) {
            const int slot = scratch_slot(work.dst_batch);
            float* dst = g.o_scratch + g.scratch_row(slot, 0) * kLatentDim;
            store_rows(o, inverse, page, dst + first_col, work.num_rows);
        } else {
            Element* dst = reinterpret_cast<Element*>(g.out) +
                           static_cast<int64_t>(work.flat_row(g, 0)) * kLatentDim;
            store_rows(o, inverse, page, dst + first_col, work.num_rows);
        }
    }
};

}  // namespace mla
