// What a partial is asked to do, and how it uses pages and semaphores: what its
// loader and its consumers agree on.
#pragma once

#include "instructions/mla_globals.cuh"

namespace mla {

// The words, decoded.
struct PartialWork {
    using Words = PartialWords;

    int dst_batch, sequence, start, end, length, num_tiles;
    TokenSpan tokens;
    int first_row, num_rows;  // of the sequence
    int num_mates, mate;      // see cluster_merge.cuh
    int adopted;              // scratch slot, see PartialWords::kAdopted; -1: none

    __device__ PartialWork(const MlaGlobals& g, const int32_t* words) {
        dst_batch = words[Words::kDstBatch];
        sequence = words[Words::kQBatch];
        start = words[Words::kStart];
        end = words[Words::kEnd];
        length = words[Words::kLength];
        tokens = g.tokens_of(sequence);
        first_row = words[Words::kQSeq] * g.num_heads + words[Words::kRowBegin];
        num_rows = words[Words::kNumRows];
        if (num_rows == 0) num_rows = min(g.q_box_rows, tokens.count * g.num_heads - first_row);
        num_tiles = num_tiles_of(words);
        num_mates = words[Words::kNumMates];
        mate = words[Words::kMate];
        adopted = words[Words::kAdopted] - 1;
    }
    __device__ bool adopts() const { return adopted >= 0; }
    __device__ bool is_shared() const { return num_mates > 1; }
    // Beyond these a partial needs no page; one that is shared keeps them all to its end.
    __device__ static int num_tiles_kept(const int32_t* words) {
        return words[Words::kNumMates] > 1 ? 1 << 24 : num_tiles_of(words);
    }
    __device__ static int num_tiles_of(const int32_t* words) {
        return (static_cast<uint32_t>(num_positions(words)) + kKvTile - 1) / kKvTile;
    }

    // KV positions that a row of the group may see: [0, visible).
    __device__ int visible(const MlaGlobals& g, int row) const {
        if (!g.causal || tokens.count == 1) return min(end, length);
        return min(end, length - tokens.count + g.by_heads.quotient(first_row + row) + 1);
    }
    // The row as q and the output count it.
    __device__ int flat_row(const MlaGlobals& g, int row) const {
        return tokens.first * g.num_heads + first_row + row;
    }
    // Of a row of the group, where the result goes.
    __device__ void store_lse(const MlaGlobals& g, int row, float lse_log2) const {
        if (writes_scratch(dst_batch)) {
            g.lse_log2_scratch[g.scratch_row(scratch_slot(dst_batch), row)] = lse_log2;
        } else {
            g.store_lse(flat_row(g, row), lse_log2);
        }
    }
    // Partial results are weighed against each other without their sinks.
    __device__ float sink_log2(const MlaGlobals& g, int row) const {
        if (g.attn_sink == nullptr || writes_scratch(dst_batch)) return -INFINITY;
        return g.sink_log2(flat_row(g, row));
    }
    __device__ int num_positions() const { return end - start; }
    __device__ static int num_positions(const int32_t* words) {
        return words[Words::kEnd] - words[Words::kStart];
    }
    __device__ bool is_last(int tile) const { return tile + 1 == num_tiles; }
    // Leading tiles that every row sees in full.
    __device__ int num_plain_tiles(const MlaGlobals& g) const {
        return max(0, visible(g, 0) - start) / kKvTile;
    }
};

// Where the positions of a range's last tile lie in it. A box that would reach past the end begins
// earlier by as many groups of rows as hold no position: what lies before its block becomes zeros,
// without being read, and only the tile's last group may have rows past the end. (In a block of
// several tiles positions before come along, which is no harm.) Where a tile comes in other ways
// its positions begin with row 0.
template <bool kWholeTileBoxes>
struct TailRows {
    int first, past_end;

    __device__ explicit TailRows(int num_positions) {
        const int missing = -num_positions & (kKvTile - 1);
        first = kWholeTileBoxes ? missing & -kGroupRows : 0;
        past_end = kKvTile - missing + first;
    }
};

// Q lies in the first pages. The others are a ring of half tiles of KV, in the order in which they
// are asked for: tile 0 left, tile 0 right, tile 1 right, tile 1 left, tile 2 left, ... A narrow
// kernel's Q needs one page only, so its ring has one more.
template <class Config>
struct PartialPages {
    static_assert(kHalfTileBytes == Config::kSmemPageBytes);
    static constexpr int kQPages = Config::kNarrow ? 1 : 2;
    static constexpr int kRing = Config::kNumSmemPages - kQPages;

    enum Semaphore {
        kQFull = 0,
        kKvFull,                     // + place; see full()
        kKvEmpty = kKvFull + kRing,  // + place
        kOutputStored = kKvEmpty + kRing,
        kAdoptedHere,    // the result that joins this one's
        kSumsPublished,  // of a partial that mates share, to the launcher
        kResultReady,    // the same
        kNumSemaphores,
    };

    // Which half of its tile a half tile is, and the other way round.
    __device__ static int half(uint32_t half_tile) { return (half_tile ^ half_tile / 2) % 2; }
    __device__ static int half_tile(int tile, int half) { return 2 * tile + (half ^ tile) % 2; }

    __device__ static int place(uint32_t half_tile) { return half_tile % kRing; }
    __device__ static int page(uint32_t half_tile) { return kQPages + place(half_tile); }
    // Semaphore that says that a half tile is there, and its phase. A wait knows the parity of a
    // phase only. That will do: who waits has had P of all tiles but the one before, so what was in
    // the place before has come; and what follows there comes when this has been read.
    __device__ static int full(uint32_t half_tile) { return kKvFull + place(half_tile); }
    __device__ static int full_phase(uint32_t half_tile) { return half_tile / kRing; }

    using Tail = TailRows<Config::kWholeTileBoxes>;

    // The k-th page that a partial of so many tiles lets go of: those of the ring in its order, the
    // unused ones first, then Q's.
    __device__ static int released_page(int num_tiles, int k) {
        return k < kRing ? page(2 * num_tiles + k) : k - kRing;
    }

    // Is it the first half tile in its page? That page is the instruction before's to give.
    __device__ static bool is_first_use(uint32_t half_tile) { return half_tile < kRing; }
    // A half tile's place is free when this phase of this mbarrier is over.
    struct Phase {
        uint32_t mbar, parity;
    };
    template <class State>
    __device__ static Phase place_free(const State& state, uint32_t half_tile) {
        if (is_first_use(half_tile)) {
            return {free(state, half_tile), state.pages_phase()};
        }
        return {empty(state, half_tile), (half_tile / kRing - 1) & 1};
    }

    // The whole of it, by one thread.
    template <class State>
    __device__ static void release_ring(const State& state) {
        for (int i = 0; i < kRing; ++i) {
            state.release_page(kQPages + i, State::Config::kPageReleaseArrivals);
        }
    }

    // For consumers: a warp has written its sums, for the other warpgroup, or for the launcher if
    // there are mates.
    template <class State>
    __device__ static void tell_of_sums(const State& state, bool is_shared, int warpgroup) {
        if (is_shared) {
            arrive_warp(state, kSumsPublished);
        } else {
            barrier_arrive(sums_ready(warpgroup), kConsumerThreads);
        }
    }

    // For consumers: a half tile is there.
    template <class State>
    __device__ static void wait_half(const MlaGlobals& g, const State& state, int half_tile) {
        state.wait(full(half_tile), full_phase(half_tile));
        see_half(g);
    }
    // What lanes copied came through the generic proxy; the tensor cores read through the other
    // one.
    __device__ static void see_half(const MlaGlobals& g) {
        if (!Config::kWholeTileBoxes && g.kv_box_rows == 0) mk::ptx::fence_proxy_async_smem();
    }

    // The mbarrier on which the warps of one warpgroup arrive, a lane of each, when they have read
    // a half tile: its page goes to a later one or to the next instruction.
    template <class State>
    __device__ static uint32_t emptied(const State& state, int half_tile, int num_tiles_kept) {
        return half_tile + kRing < 2 * num_tiles_kept ? empty(state, half_tile)
                                                      : free(state, half_tile);
    }
    template <class State>
    __device__ static uint32_t empty(const State& state, int half_tile) {
        return state.semaphore(kKvEmpty + place(half_tile));
    }
    template <class State>
    __device__ static uint32_t free(const State& state, int half_tile) {
        return state.page_free(page(half_tile));
    }
};

}  // namespace mla
