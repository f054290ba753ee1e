// The consumers of a partial of up to 64 rows: rows are the wgmma's M.
//
// Two warpgroups. Scores and softmax: the left one does even tiles, the right one odd tiles.
// Output: the left one accumulates latent columns 0-255 of all tiles, the right one columns
// 256-511. So the softmax of one tile runs under the matrix products of its neighbour, and O fits
// in registers.
//
// Scores are kept in base 2: p = 2^(s * scale_log2 - m), with m the running maximum of s in the
// same units. The warpgroups hand each other P (16 bits) and m through shared memory.
#pragma once

#include "instructions/epilogue.cuh"
#include "instructions/partial_work.cuh"
#include "megakernel/state.cuh"

namespace mla {

template <class Config>
struct WideConsumer {
    using State = mk::State<Config>;
    using Element = typename Config::Element;
    using Pages = PartialPages<Config>;

    // The epilogue stands once, for both warpgroups: it is long straight code that runs once
    // per instruction, and code that comes from L2 takes ten cycles an instruction (H200).
    __device__ static void run(const MlaGlobals& g, State& state) {
        Accumulator o;
        RowState rows;
        kittens::zero(o);
        const int half = threadIdx.x / kWarpgroupThreads;
        if (half == kLeft) {
            Warpgroup<kLeft>(g, state, o, rows).attend();
        } else {
            Warpgroup<kRight>(g, state, o, rows).attend();
        }
        // Each warpgroup has summed the tiles that it scored itself.
        Scratch& shared = scratch(state);
        rows.publish_sum(shared.row_sum[half]);
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        rows.add_sum(shared.row_sum[half ^ 1]);

        // Both have done with Q: its pages hold the output now, then the next instruction's Q.
        store_output(g, state, half, o, rows);
        mk::ptx::fence_proxy_async_smem();
        __syncwarp();
        const bool first_lane = mk::ptx::thread_in_cta() % mk::kWarpThreads == 0;
        if (first_lane) state.release_page(half, 1);
        if (half == kLeft) store_lse(g, state, rows);
        if (mk::ptx::thread_in_cta() == 0) state.record(mk::TimingWord::kComputeEnd);
        __syncwarp();
        if (first_lane) state.arrive(Pages::kOutputStored);
    }

  private:
    // What the warpgroups hand each other, in the consumers' scratch.
    struct Scratch {
        PTile<Element> p;
        float even_max[kMaxRows];
        float odd_max[kMaxRows];
        float row_sum[2][kMaxRows];
        int visible[kMaxRows];  // positions from the start on
    };
    static_assert(sizeof(Scratch) <= Config::kScratchBytes);

    __device__ static Scratch& scratch(const State& state) {
        return *reinterpret_cast<Scratch*>(state.scratch());
    }
    __device__ static uint32_t page_address(const State& state, int logical) {
        return mk::ptx::smem_address(state.page(logical));
    }

    __device__ static void store_output(const MlaGlobals& g,
                                        const State& state,
                                        int half,
                                        const Accumulator& o,
                                        const RowState& rows) {
        const PartialWork work(g, state.words());
        // Warps without a row of the group have nothing to store.
        if (fragment_row() / 16 * 16 >= work.num_rows) return;
        const uint32_t page = page_address(state, half);
        float sink_log2[2] = {-INFINITY, -INFINITY};
        if (writes_scratch(work.dst_batch)) {
            const int slot = scratch_slot(work.dst_batch);
            float* dst = g.o_scratch + g.scratch_row(slot, 0) * kLatentDim;
            store_rows(
                o, rows.inverse_sum(sink_log2), page, dst + half * kHalfLatent, work.num_rows);
            return;
        }
        if (g.attn_sink != nullptr) {
            for (int i = 0; i < 2; ++i) {
                const int row = min(fragment_row() + 8 * i, work.num_rows - 1);
                const int flat = work.flat_row(g, row);
                sink_log2[i] = g.sink_log2(flat / g.num_heads, flat % g.num_heads);
            }
        }
        Element* dst = reinterpret_cast<Element*>(g.out) +
                       static_cast<int64_t>(work.flat_row(g, 0)) * kLatentDim;
        store_rows(o, rows.inverse_sum(sink_log2), page, dst + half * kHalfLatent, work.num_rows);
    }

    __device__ static void store_lse(const MlaGlobals& g,
                                     const State& state,
                                     const RowState& rows) {
        if (mk::ptx::thread_in_cta() % 4 != 0) return;
        const PartialWork work(g, state.words());
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = fragment_row() + 8 * i;
            if (row >= work.num_rows) continue;
            const float lse_log2 = rows.lse_log2(i);
            if (writes_scratch(work.dst_batch)) {
                const int slot = scratch_slot(work.dst_batch);
                g.lse_log2_scratch[g.scratch_row(slot, row)] = lse_log2;
            } else {
                const int flat = work.flat_row(g, row);
                g.store_lse(flat / g.num_heads, flat % g.num_heads, lse_log2);
            }
        }
    }

    template <Half kHalf>
    struct Warpgroup {
        const MlaGlobals& g;
        State& state;
        Accumulator& o;
        RowState& rows;
        // Registers are what this code is short of: words are read again where they are
        // needed, and these two numbers are all that the loop asks for.
        int num_tiles;
        int plain_tiles;  // leading tiles that every row sees in full

        __device__ Warpgroup(const MlaGlobals& g, State& state, Accumulator& o, RowState& rows)
            : g(g), state(state), o(o), rows(rows) {
            const PartialWork work(g, state.words());
            num_tiles = work.num_tiles;
            plain_tiles = work.num_plain_tiles(g);
            // Each warp writes what its own lanes will read.
            if (mk::ptx::thread_in_cta() % 4 == 0) {
                for (const int row : {fragment_row(), fragment_row() + 8}) {
                    scratch().visible[row] = work.visible(g, row) - work.start;
                }
            }
            __syncwarp();
        }

        __device__ void attend() {
            state.wait(Pages::kQFull, 0);
            if (threadIdx.x == 0) state.record(mk::TimingWord::kComputeBegin);
            const int num_pairs = (num_tiles + 1) / 2;
            for (int pair = 0; pair < num_pairs; ++pair) {
                const bool has_odd = 2 * pair + 1 < num_tiles;
                if constexpr (kHalf == kLeft) {
                    left_pair(pair, has_odd);
                } else {
                    has_odd ? right_pair(pair) : right_single(2 * pair);
                }
            }
        }

        // ---- one pair of tiles ------------------------------------------------------
        //
        // The tensor cores' order, and what runs beside it:
        //     scores of the even tile
        //     scores of the odd tile      | softmax of the even one, left
        //     even P V, left and right    | softmax of the odd one, right
        //     odd P V, left and right
        // A warpgroup's products queue up in order; between the two the barriers decide.

        __device__ void left_pair(int pair, bool has_odd) {
            const int even = 2 * pair, odd = even + 1;
            Scores s;
            PFragment<Element> p;
            send_scores(s, even);
            kittens::warpgroup::mma_async_wait();
            barrier_arrive(NamedBarrier::kEvenScored, kConsumerThreads);
            mask(s, even);
            const RowScale moved = rows.template absorb<Element>(s, p, g.scale_log2);
            // The last odd tile's P has been read: these scores came after it in the queue.
            publish(p, scratch().even_max);
            barrier_arrive(NamedBarrier::kEvenPReady, kConsumerThreads);

            clear_past_length(even);
            moved.apply(o);
            if (has_odd) barrier_sync(NamedBarrier::kOddScored, kConsumerThreads);
            accumulate<Element>(o, p, half_page(even));
            kittens::warpgroup::mma_async_wait();
            release(even);
            if (!has_odd) return;

            wait_kv(odd, kLeft);
            clear_past_length(odd);
            barrier_sync(NamedBarrier::kOddPReady, kConsumerThreads);
            rows.follow(scratch().odd_max).apply(o);
            accumulate<Element>(o, scratch().p, half_page(odd));
            kittens::warpgroup::mma_async_wait();
            release(odd);
        }

        __device__ void right_pair(int pair) {
            const int even = 2 * pair, odd = even + 1;
            Scores s;
            PFragment<Element> p;
            barrier_sync(NamedBarrier::kEvenScored, kConsumerThreads);
            send_scores(s, odd);
            RowScale followed = follow_even(even);
            kittens::warpgroup::mma_async_wait();
            followed.pin();
            barrier_arrive(NamedBarrier::kOddScored, kConsumerThreads);
            followed.apply(o);
            accumulate<Element>(o, scratch().p, half_page(even));

            mask(s, odd);
            const RowScale moved = rows.template absorb<Element>(s, p, g.scale_log2);
            clear_past_length(odd);
            kittens::warpgroup::mma_async_wait();
            warpgroup_sync<kRight>();  // all four warps have read the even tile's P
            publish(p, scratch().odd_max);
            barrier_arrive(NamedBarrier::kOddPReady, kConsumerThreads);
            release(even);
            moved.apply(o);
            accumulate<Element>(o, p, half_page(odd));
            kittens::warpgroup::mma_async_wait();
            release(odd);
        }

        // The last tile of an odd number.
        __device__ void right_single(int tile) {
            barrier_sync(NamedBarrier::kEvenScored, kConsumerThreads);
            follow_even(tile).apply(o);
            accumulate<Element>(o, scratch().p, half_page(tile));
            kittens::warpgroup::mma_async_wait();
            release(tile);
        }

        // ---- its steps ----------------------------------------------------------------

        __device__ Scratch& scratch() const { return WideConsumer::scratch(state); }
        // Shared-memory addresses.
        __device__ uint32_t page(int logical) const { return page_address(state, logical); }
        __device__ uint32_t half_page(int tile) const {
            return page(Pages::page(2 * tile + kHalf));
        }

        // Right: P of the even tile is there, and so is its half of V.
        __device__ RowScale follow_even(int even) {
            wait_kv(even, kRight);
            clear_past_length(even);
            barrier_sync(NamedBarrier::kEvenPReady, kConsumerThreads);
            return rows.follow(scratch().even_max);
        }

        __device__ void wait_kv(int tile, int half) const {
            Pages::wait_half(g, state, 2 * tile + half);
        }

        // Sends S = Q K^T of one tile to the tensor cores.
        __device__ void send_scores(Scores& s, int tile) {
            wait_kv(tile, kLeft);
            multiply_scores<Element, true>(s, page(kLeft), page(Pages::page(2 * tile + kLeft)));
            wait_kv(tile, kRight);
            multiply_scores<Element, false>(s, page(kRight), page(Pages::page(2 * tile + kRight)));
            kittens::warpgroup::mma_commit_group();
        }

        // Scores that a row must not see become -inf, whatever was read for them.
        __device__ void mask(Scores& s, int tile) const {
            if (tile < plain_tiles) return;
            const int* visible = scratch().visible + fragment_row();
            hide_past(s, visible[0] - tile * kKvTile, visible[8] - tile * kKvTile);
        }

        // V rows past the request's length meet P = 0, but NaN * 0 is NaN: they become 0.
        // Each warpgroup clears the half that it multiplies.
        __device__ void clear_past_length(int tile) const {
            if (tile < plain_tiles) return;
            const int valid = state.word(PartialWords::kLength) - state.word(PartialWords::kStart) -
                              tile * kKvTile;
            if (valid >= kKvTile) return;
            clear_rows(half_page(tile), valid);
            mk::ptx::fence_proxy_async_smem();
            warpgroup_sync<kHalf>();
        }

        __device__ void publish(const PFragment<Element>& p, float* row_max) const {
            kittens::warpgroup::store(scratch().p, p);
            rows.publish_max(row_max);
            mk::ptx::fence_proxy_async_smem();
        }

        // This warpgroup's half of a tile has been read.
        __device__ void release(int tile) const {
            Pages::release_half(state, 2 * tile + kHalf, num_tiles);
        }
    };
};

}  // namespace mla
