// The consumers of a partial of up to 32 rows: rows are the wgmma's N, see
// narrow_fragments.cuh.
//
// Two warpgroups see-saw as in a wide partial, see wide_consumer.cuh: they score tiles in turns,
// and of the output each accumulates half the latent columns over all tiles. But here P is an
// operand in shared memory for both.
#pragma once

#include "instructions/cluster_merge.cuh"
#include "instructions/epilogue.cuh"
#include "instructions/narrow_softmax.cuh"
#include "instructions/partial_work.cuh"
#include "megakernel/state.cuh"

namespace mla {

template <class Config>
class NarrowConsumer {
    using State = mk::State<Config>;
    using Element = typename Config::Element;
    using Pages = PartialPages<Config>;
    using Mates = ClusterMerge<Config>;

  public:
    static constexpr bool kWaitsForEarlierKernels = true;
    __device__ static void run(const MlaGlobals& g, State& state) {
        if (g.cu_seqlens_q != nullptr) mk::ptx::wait_for_earlier_kernels();
        NarrowConsumer consumer(g, state);
        consumer.attend();
        consumer.finish();
    }

    // By the launcher, of a partial that mates share, when sums have been published: LSEs. And
    // where the scales are.
    __device__ static RowNotes find_lses(const State& state, int) {
        Scratch& shared = *reinterpret_cast<Scratch*>(state.scratch());
        const int row = mk::ptx::thread_in_cta() % mk::kWarpThreads;
        const float sum = sum_of(shared, row);
        float* lse_log2 = shared.exchange[0].of_warp[0];
        lse_log2[row] = sum > 0.f ? shared.max[row] + __log2f(sum) : -INFINITY;
        __syncwarp();
        return {lse_log2, shared.max, shared.max};
    }

  private:
    static constexpr int kGroups = 2;  // warpgroups
    static constexpr int kQPage = 0;
    static constexpr int kRows = Config::kRows;
    static constexpr int kThreadRows = kRows / 4;
    using Row = NarrowRow<kRows>;
    using Scores = NarrowScores<kRows>;
    using Block = NarrowBlock<kRows>;

    struct Scratch {
        NarrowPTile<Element, kRows> p[kGroups];  // of the tile that each scored last
        NarrowExchange exchange[kGroups];   // maxima; in the end, sums of a warpgroup's own tiles
        float max[kNarrowRows];             // that the last P is relative to
        int visible[kGroups][kNarrowRows];  // positions from the start on
        // For stamps, by warp.
        float lse_log2[Config::kStampsResults ? Config::kNumConsumerWarps : 1][kNarrowRows];
    };
    static_assert(sizeof(Scratch) <= Config::kScratchBytes);

    const MlaGlobals& g;
    const State& state;
    const PartialWork work;
    const int group = __shfl_sync(~0u, mk::ptx::thread_in_cta() / kWarpgroupThreads, 0);
    const int num_tiles_kept;
    const int plain_tiles;  // leading tiles that every row sees in full
    NarrowOutput<kRows> o;
    NarrowState<kRows> rows;

    __device__ NarrowConsumer(const MlaGlobals& g, State& state)
        : g(g),
          state(state),
          work(g, state.words()),
          num_tiles_kept(PartialWork::num_tiles_kept(state.words())),
          plain_tiles(work.num_plain_tiles(g)),
          rows(work.num_rows) {
#pragma unroll
        for (Block& block : o.block) kittens::zero(block);
        note_rows();
        state.wait(Pages::kQFull, 0);
        mk::ptx::wait_for_earlier_kernels();
        if (threadIdx.x == 0) state.record(mk::TimingWord::kComputeBegin);
    }

    __device__ Scratch& scratch() const { return *reinterpret_cast<Scratch*>(state.scratch()); }
    __device__ uint32_t page(int logical) const {
        return uniform(mk::ptx::smem_address(state.page(logical)));
    }
    __device__ void sync_warpgroup() const {
        mk::ptx::named_barrier_sync(warpgroup_barrier(group), kWarpgroupThreads);
    }
    __device__ static int warp() { return mk::ptx::thread_in_cta() / mk::kWarpThreads; }
    __device__ static NamedBarrier p_ready(int group) {
        return group == 0 ? NamedBarrier::kEvenPReady : NamedBarrier::kOddPReady;
    }

    // What each row sees, and its maximum, which the first tile's warpgroup tells the other one.
    __device__ void note_rows() {
        const int row = mk::ptx::thread_in_cta() % kWarpgroupThreads;
        if (row < kNarrowRows) {
            scratch().visible[group][row] = work.visible(g, row) - work.start;
            if (group == 0) scratch().max[row] = NarrowState<kRows>::first_max(row, work.num_rows);
        }
        sync_warpgroup();
    }

    // ---- the tiles ------------------------------------------------------------------

    // A tile's first half tile is that of the warpgroup that scores it.
    __device__ void attend() {
        const NarrowHalfQ q_own(page(kQPage), g.q_box_rows, group);
        const NarrowHalfQ q_other(page(kQPage), g.q_box_rows, 1 - group);
        int tile = group;
        for (; tile < work.num_tiles; tile += kGroups) {
            Scores s;
            const int own = 2 * tile, other = own + 1;
            const HalfK k_own(page(Pages::page(own))), k_other(page(Pages::page(other)));
            Pages::wait_half(g, state, own);
            multiply_scores<Element, true>(s, q_own, k_own);
            kittens::warpgroup::mma_commit_group();
            // P of the first tile comes late. Of later ones it is there before the other half is.
            if (tile >= kGroups) add_others(tile - 1);
            Pages::wait_half(g, state, other);
            multiply_scores<Element, false>(s, q_other, k_other);
            kittens::warpgroup::mma_commit_group();
            if (tile == 1) {
                add_others(0);
                kittens::warpgroup::mma_async_wait<1>();
            } else {
                kittens::warpgroup::mma_async_wait();
            }
            add_own(s, tile);
        }
        if (tile > work.num_tiles) return;
        add_others(work.num_tiles - 1);
        publish_sums();
        kittens::warpgroup::mma_async_wait();
        let_go(other_half(work.num_tiles - 1));
    }

    // Of the other warpgroup's tile the half tile that is this one's.
    __device__ static int other_half(int tile) { return 2 * tile + 1; }

    // The other one has written P after it had all of the tile.
    __device__ void add_others(int tile) {
        const VOperand v(page(Pages::page(other_half(tile))));
        barrier_sync(p_ready(1 - group), kConsumerThreads);
        Pages::see_half(g);
        const Row max = rows_of<kRows>(scratch().max);
        if (__any_sync(~0u, rows.differs(max))) rows.move_max(max, o, tile > 0);
        accumulate<Element>(o, p_operand(1 - group), v);
    }

    __device__ POperand p_operand(int group) const {
        return POperand(uniform(mk::ptx::smem_address(&scratch().p[group])));
    }

    // P is written where it was two tiles ago. (Before the vote all four warps have read the other
    // warpgroup's maxima, in whose place a new one goes.)
    __device__ void add_own(Scores& s, int tile) {
        Scratch& shared = scratch();
        if (tile >= plain_tiles) {
            const typename Pages::Tail tail(PartialWork::num_positions(state.words()));
            const bool is_last = work.is_last(tile);
            hide_outside(s, shared.visible[group], is_last ? tail.first : 0, tile * kKvTile);
            if (is_last) clear_past_end(tail.past_end);
        }
        const bool exceeded = rows.is_exceeded(s, g.scale_log2);
        if (mk::ptx::named_barrier_any(warpgroup_barrier(group), kWarpgroupThreads, exceeded)) {
            rows.raise_max(s, o, g.scale_log2, shared.exchange[group], shared.max, tile > 0, [&] {
                kittens::warpgroup::mma_async_wait();
                sync_warpgroup();
            });
        }
        rows.weigh(s, shared.p[group], g.scale_log2);
        mk::ptx::fence_proxy_async_smem();
        // The other warpgroup's P has been read: told of this one, it may write its next.
        kittens::warpgroup::mma_async_wait();
        barrier_arrive(p_ready(group), kConsumerThreads);
        if (tile > 0) let_go(other_half(tile - 1));
        sync_warpgroup();
        accumulate<Element>(o, p_operand(group), VOperand(page(Pages::page(2 * tile))));
        if (work.is_last(tile)) publish_sums();
        kittens::warpgroup::mma_async_wait();
        let_go(2 * tile);
    }

    // While the last tile is being added.
    __device__ void publish_sums() const {
        rows.publish_sums(scratch().exchange[group]);
        Pages::tell_of_sums(state, work.is_shared(), group);
    }

    __device__ void let_go(int half_tile) const {
        const uint32_t emptied = Pages::emptied(state, half_tile, num_tiles_kept);
        if (is_first_lane()) mk::ptx::mbar_arrive(emptied);
    }

    // V rows of the last tile past the end meet P = 0, but NaN * 0 is NaN: they become 0.
    __device__ void clear_past_end(int past_end) const {
        if (past_end == kKvTile) return;
        clear_rows(page(Pages::page(2 * work.num_tiles - 2)), past_end);
        clear_rows(page(Pages::page(2 * work.num_tiles - 1)), past_end);
    }

    // ---- the end --------------------------------------------------------------------

    __device__ void finish() {
        if (mk::ptx::as_written(!work.is_shared())) {
            const auto [lse_log2, inverse, adopted] = finish_rows();
            multiply(o, rows_of_lanes<kRows>(inverse));
            if (work.adopts()) add_adopted(adopted);
            store_output();
            const int row = mk::ptx::thread_in_cta() % mk::kWarpThreads;
            if (warp() == 1 && row < work.num_rows) work.store_lse(g, row, lse_log2);
        } else {
            merge_with_mates();
        }

        __syncwarp();
        const bool first_lane = is_first_lane();
        if (first_lane) state.arrive(Pages::kOutputStored);
        mk::ptx::fence_proxy_async_smem();
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        if (group == 0 && first_lane) state.release_page(kQPage, 1);
        if (mk::ptx::thread_in_cta() == 0) {
            state.record(mk::TimingWord::kComputeEnd);
            if (work.is_shared()) Pages::release_ring(state);
        }
    }

    __device__ void merge_with_mates() {
        const Mates mates(g, state, work);
        arrive_warp(state, Pages::kResultReady);
        // Of the ring, a page that had none of the last tile's keys.
        const int page = Mates::kInboxWhereQWas ? Pages::page(2 * work.num_tiles) : kQPage;
        const auto sender = [&](int col) { return mates.sender(col); };
        store<float>(page, work.num_rows, sender, [&] { mates.wait_open(); });
        mates.merge([](int, int) { return 0u; });
    }

    struct EndOfRow {
        float lse_log2;
        float inverse, adopted;  // what the output is multiplied with, and another partial's
    };
    // By each warp for itself, a lane for each row.
    __device__ EndOfRow finish_rows() const {
        static_assert(kNarrowRows == mk::kWarpThreads);
        const int row = mk::ptx::thread_in_cta() % mk::kWarpThreads;
        Scratch& shared = scratch();
        barrier_sync(sums_ready(1 - group), kConsumerThreads);
        const float sum = sum_of(shared, row);
        const float max = shared.max[row];
        float top = max, adopted_lse_log2 = -INFINITY;
        if (work.adopts()) {
            state.wait(Pages::kAdoptedHere, 0);
            const int64_t from = g.scratch_row(work.adopted, min(row, work.num_rows - 1));
            adopted_lse_log2 = __ldcg(&g.lse_log2_scratch[from]);
            top = fmaxf(top, adopted_lse_log2);
        }
        const float own = mk::ptx::exp2_approx(max - top);
        const float adopted = mk::ptx::exp2_approx(adopted_lse_log2 - top);
        float total = own * sum + adopted;
        const bool seen = total > 0.f;
        const float lse_log2 = seen ? top + __log2f(total) : -INFINITY;
        if (g.attn_sink != nullptr) {
            const float sink_log2 = work.sink_log2(g, min(row, work.num_rows - 1));
            total += mk::ptx::exp2_approx(sink_log2 - top);
        }
        const float inverse = seen ? mk::ptx::reciprocal_approx(total) : 0.f;
        if (Config::kStampsResults) shared.lse_log2[warp()][row] = lse_log2;
        return {lse_log2, own * inverse, adopted * inverse};
    }

    __device__ static float sum_of(const Scratch& shared, int row) {
        float sum = 0.f;
#pragma unroll
        for (const NarrowExchange& sums : shared.exchange) {
#pragma unroll
            for (const auto& of_warp : sums.of_warp) sum += of_warp[row];
        }
        return sum;
    }

    // The warpgroup's columns of another partial's result.
    __device__ void add_adopted(float adopted) {
        const float* from = g.o_scratch + g.scratch_row(work.adopted, 0) * kLatentDim +
                            group * kHalfLatent + fragment_row();
        const Row weight = rows_of_lanes<kRows>(adopted);
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r) {
            const int row = min(thread_row(r), work.num_rows - 1);
#pragma unroll
            for (int i = 0; i < 2 * kHalfBlocks; ++i) {
                float x = __ldcg(&from[row * kLatentDim + i / 2 * kBlockCols + i % 2 * 8]);
                if (Config::kStampsResults) x = Stamp::value(__float_as_uint(x));
                element(o.block[i / 2], r, i % 2) += weight.of[r] * x;
            }
        }
    }

    static constexpr int kThreadPairs = kThreadRows / 2;
    static constexpr int kRowsAtOnce = 16;

    // A row of a warpgroup's columns, on its way out. The pad keeps the rows that a warp puts down
    // at once in different banks.
    template <class T>
    static constexpr int kStagedRowBytes = kHalfLatent * sizeof(T) + 16;

    // Puts sixteen rows of a warpgroup's columns into shared memory: floats one by one, what is
    // rounded by matrices of eight by eight.
    __device__ void stage(int first, uint32_t staged, int pitch, float) {
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
    __device__ void stage(int first, uint32_t staged, int pitch, T) {
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

    __device__ void store_output() {
        if (writes_scratch(work.dst_batch)) {
            float* dst = g.o_scratch + g.scratch_row(scratch_slot(work.dst_batch), 0) * kLatentDim;
            const auto writer = [&](int col) {
                if constexpr (Config::kStampsResults) {
                    const Stamp stamp(mk::launch_epoch<Config>(), col / kVectorColumns);
                    return stamped_row_writer(dst + col, stamp, scratch().lse_log2[warp()]);
                } else {
                    return row_writer(dst + col);
                }
            };
            store<float>(kQPage, work.num_rows, writer, [] {});
        } else {
            Element* dst = reinterpret_cast<Element*>(g.out) +
                           static_cast<int64_t>(work.flat_row(g, 0)) * kLatentDim;
            const auto writer = [&](int col) { return row_writer(dst + col); };
            store<Element>(kQPage, work.num_rows, writer, [] {});
        }
    }

    // Gives away this warpgroup's half of the columns, by way of its half of a page, so that
    // whole cache lines leave: way(column)(row, 16 bytes of T). Before the first, begin().
    template <class T, class Way, class Begin>
    __device__ void store(int page, int num_rows, Way way, Begin begin) {
        constexpr int kPitch = kStagedRowBytes<T>;
        static_assert(kGroups * kRowsAtOnce * kPitch <= Config::kSmemPageBytes);
        const int thread = mk::ptx::thread_in_cta() % kWarpgroupThreads;
        const uint32_t staged =
            mk::ptx::smem_address(state.page(page)) + group * kRowsAtOnce * kPitch;
#pragma unroll
        for (int first = 0; first < kThreadPairs; first += kRowsAtOnce / 8) {
            if (first * 8 >= num_rows) break;
            if (first > 0) sync_warpgroup();  // all have taken what lay there
            stage(first, staged, kPitch, T{});
            sync_warpgroup();
            if (first == 0) begin();
            constexpr int kVectorsPerRow = kHalfLatent * sizeof(T) / 16;
            constexpr int kTogether = kWarpgroupThreads / kVectorsPerRow;  // rows
            const int row = thread / kVectorsPerRow, vector = thread % kVectorsPerRow;
            const auto put = way(group * kHalfLatent + vector * (16 / static_cast<int>(sizeof(T))));
            constexpr int kInFlight = 4;
#pragma unroll 1
            for (int from = 0; from < kRowsAtOnce / kTogether; from += kInFlight) {
                float4 v[kInFlight];
#pragma unroll
                for (int i = 0; i < kInFlight; ++i) {
                    v[i] = mk::ptx::load_smem_float4(
                        staged + (row + (from + i) * kTogether) * kPitch + vector * 16);
                }
#pragma unroll
                for (int i = 0; i < kInFlight; ++i) {
                    const int to = first * 8 + row + (from + i) * kTogether;
                    if (to < num_rows) put(to, v[i]);
                }
            }
        }
    }
};

}  // namespace mla
