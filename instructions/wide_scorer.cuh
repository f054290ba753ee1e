// The scorers of a partial of up to 64 rows: see wide_exchange.cuh.
//
// Scores are kept in base 2: p = 2^(s * scale_log2 - m), with m the running maximum of s in the
// same units.
#pragma once

#include "instructions/wide_exchange.cuh"

namespace mla {

template <class Config>
class WideScorer {
    using State = mk::State<Config>;
    using Element = typename Config::Element;
    using Pages = PartialPages<Config>;
    using Exchange = WideExchange<Config>;

  public:
    __device__ static void run(const MlaGlobals& g, State& state) {
        WideScorer scorer(g, state);
        scorer.score_tiles();
        scorer.finish();
    }

  private:
    const MlaGlobals& g;
    State& state;
    int num_tiles;
    int plain_tiles;                 // leading tiles that every row sees in full
    int visible[2];                  // positions that this thread's rows see, from the start on
    const int row = fragment_row();  // and the one eight below
    const HalfQ q_left, q_right;
    RowState rows;

    __device__ WideScorer(const MlaGlobals& g, State& state)
        : g(g), state(state), q_left(page(kLeft)), q_right(page(kRight)) {
        const PartialWork work(g, state.words());
        num_tiles = work.num_tiles;
        plain_tiles = work.num_plain_tiles(g);
        for (int i = 0; i < 2; ++i) visible[i] = work.visible(g, row + 8 * i) - work.start;
    }

    __device__ uint32_t page(int logical) const {
        return mk::ptx::smem_address(state.page(logical));
    }

    struct Keys {
        HalfK left, right;
        __device__ Keys(const WideScorer& scorer, int tile)
            : left(scorer.page(Pages::page(2 * tile + kLeft))),
              right(scorer.page(Pages::page(2 * tile + kRight))) {}
    };

    // Where the next tile lies is looked up while the tensor cores are busy.
    __device__ void score_tiles() {
        state.wait(Pages::kQFull, 0);
        if (is_first_thread()) state.record(mk::TimingWord::kComputeBegin);
        Scores s;
        send_scores(s, Keys(*this, 0), 0);
        for (int tile = 0;; ++tile) {
            const Keys next(*this, tile + 1);
            kittens::warpgroup::mma_async_wait();
            put_p(s, tile);
            barrier_arrive(NamedBarrier::kPReady, kWideThreads);
            if (tile + 1 == num_tiles) break;
            send_scores(s, next, tile + 1);
        }
    }

    __device__ void send_scores(Scores& s, const Keys& keys, int tile) {
        Pages::wait_half(g, state, 2 * tile + kLeft);
        multiply_scores<Element, true>(s, q_left, keys.left);
        Pages::wait_half(g, state, 2 * tile + kRight);
        multiply_scores<Element, false>(s, q_right, keys.right);
        kittens::warpgroup::mma_commit_group();
    }

    // Scores become P in scratch.
    __device__ void put_p(Scores& scores, int tile) {
        if (tile >= plain_tiles) {
            hide_past(scores, visible[0] - tile * kKvTile, visible[1] - tile * kKvTile);
        }
        PFragment<Element> p;
        const RowScale moved = rows.template absorb<Element>(scores, p, g.scale_log2);
        if (tile == 0) {
            state.wait(Pages::kScratchFree, 0);
        } else {
            barrier_sync(NamedBarrier::kPFree, kWideThreads);
        }
        Exchange& exchange = Exchange::of(state);
        kittens::warpgroup::store(exchange.p, p);
        publish_rows(exchange.scale, moved);
        mk::ptx::fence_proxy_async_smem();
    }

    // All four threads of a quad write the same.
    __device__ void publish_rows(float* to, const RowScale& scale) const {
        to[row] = scale.factor[0];
        to[row + 8] = scale.factor[1];
    }

    // While the last tile is being accumulated.
    __device__ void finish() {
        rows.sum_up();
        const PartialWork work(g, state.words());
        publish_rows(Exchange::of(state).inverse, inverse_sum(work));
        barrier_arrive(NamedBarrier::kSumsReady, kWideThreads);
        store_lse(work);
        __syncwarp();
        if (is_first_lane()) state.arrive(Pages::kOutputStored);
    }

    __device__ RowScale inverse_sum(const PartialWork& work) const {
        float sink_log2[2] = {-INFINITY, -INFINITY};
        if (g.attn_sink != nullptr && !writes_scratch(work.dst_batch)) {
            for (int i = 0; i < 2; ++i) {
                sink_log2[i] = g.sink_log2(work.flat_row(g, min(row + 8 * i, work.num_rows - 1)));
            }
        }
        return rows.inverse_sum(sink_log2);
    }

    __device__ void store_lse(const PartialWork& work) const {
        if (mk::ptx::thread_in_cta() % 4 != 0) return;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int own = row + 8 * i;
            if (own >= work.num_rows) continue;
            const float lse_log2 = rows.lse_log2(i);
            if (writes_scratch(work.dst_batch)) {
                g.lse_log2_scratch[g.scratch_row(scratch_slot(work.dst_batch), own)] = lse_log2;
            } else {
                g.store_lse(work.flat_row(g, own), lse_log2);
            }
        }
    }

    __device__ static bool is_first_thread() {
        return mk::ptx::thread_in_cta() == Config::kNumConsumerWarps * mk::kWarpThreads;
    }
};

}  // namespace mla
