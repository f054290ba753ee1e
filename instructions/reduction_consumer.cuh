// The consumers of a reduction: sixteen teams of sixteen threads. A team sums chunks, 64 columns of
// one row each, over the inputs; where there are fewer chunks than teams, several teams share one.
//
// Every thread copies its four columns of input after input from L2 into places of its own in
// shared memory, two batches ahead, and sums them from there. So much is on its way at once, while
// the code stays a few short loops: it runs once or twice in a launch, and instructions that are
// not in the SM's cache yet cost more than what they do.
#pragma once

#include "instructions/reduction_work.cuh"
#include "megakernel/state.cuh"

namespace mla {

template <class Config>
class ReductionConsumer {
    using State = mk::State<Config>;
    using Element = typename Config::Element;
    using Work = ReductionWork;
    using Pages = ReductionPages<Config>;

    static constexpr int kColumnsPerThread = 4;
    static constexpr int kTeamThreads = kColumnChunk / kColumnsPerThread;
    static constexpr int kTeamsLog2 = 4;
    static constexpr int kTeams = 1 << kTeamsLog2;
    static_assert(kTeams * kTeamThreads == kConsumerThreads);
    // (chunk, input) pairs that a team copies at a time: lane i knows all of the i-th but its
    // columns.
    static constexpr int kBatchLog2 = 4;
    static constexpr int kBatch = 1 << kBatchLog2;
    static_assert(kBatch == kTeamThreads);
    static constexpr int kBatchesAhead = 2;

  public:
    __device__ static void run(const MlaGlobals& g, const State& state) {
        const Work work(g, state.words());
        note_sinks(g, state, work);
        state.wait(Pages::kInputsReady, 0);
        if (threadIdx.x == 0) state.record(mk::TimingWord::kComputeBegin);
        ReductionConsumer(g, state, work).merge();
        mk::ptx::fence_proxy_async_smem();
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        store_lses(g, state, work);
        if (threadIdx.x == 0) {
            for (int page = 0; page < Pages::kStaging; ++page) {
                state.release_page(page, Config::kPageReleaseArrivals);
            }
            state.record(mk::TimingWord::kComputeEnd);
        }
        __syncwarp();
        if (threadIdx.x % mk::kWarpThreads == 0) state.arrive(Pages::kResultStored);
        // Nobody begins the next instruction's scratch before all have read this one's.
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
    }

  private:
    // Four columns of one row, summed over inputs: values relative to 2^top.
    struct Sum {
        float4 value;
        float top, total;

        __device__ void begin() {
            value = {0.f, 0.f, 0.f, 0.f};
            top = -INFINITY;
            total = 0.f;
        }
        __device__ void rescale(float to) {
            const float factor = top == -INFINITY ? 0.f : mk::ptx::exp2_approx(top - to);
            value.x *= factor;
            value.y *= factor;
            value.z *= factor;
            value.w *= factor;
            total *= factor;
            top = to;
        }
        __device__ void add(const float4& v, float weight) {
            value.x += weight * v.x;
            value.y += weight * v.y;
            value.z += weight * v.z;
            value.w += weight * v.w;
        }
    };

    // What lane i of a team knows of the i-th pair of a batch.
    struct Pair {
        int source;      // in o_scratch, counted by 64 columns; -1: there is no such pair
        float lse_log2;  // -inf if there is none
    };

    struct Scratch {
        float4 value[kTeams][kTeamThreads];
        float top[kTeams], total[kTeams];
        float sink_log2[kMaxRows];
        float lse_log2[kMaxRows];
    };
    static_assert(sizeof(Scratch) <= Config::kScratchBytes);
    // Where a partial keeps P, which it has read before its last barrier.
    __device__ static Scratch& scratch(const State& state) {
        return *reinterpret_cast<Scratch*>(state.scratch());
    }

    const MlaGlobals& g;
    const State& state;
    const Work& work;
    const int team = threadIdx.x / kTeamThreads, lane = threadIdx.x % kTeamThreads;
    // Powers of two, by their logarithms: what runs once has no time for divisions.
    int sharing_log2;       // teams that share a chunk
    int width_log2;         // inputs of a chunk that a batch holds, padded
    int num_pairs;          // of a batch, those included
    int batches_per_chunk;  // more than one only if a batch holds a single chunk
    int num_rounds;         // in which a team sums chunks_at_once; as many for all teams

    __device__ ReductionConsumer(const MlaGlobals& g, const State& state, const Work& work)
        : g(g), state(state), work(work) {
        const int num_chunks = work.num_chunks(), num_inputs = work.num_inputs;
        sharing_log2 = 0;
        while (num_chunks << sharing_log2 + 1 <= kTeams && 1 << sharing_log2 < num_inputs) {
            ++sharing_log2;
        }
        const int own_inputs = rounded_up(num_inputs, sharing_log2);
        width_log2 = 0;
        while (1 << width_log2 < min(own_inputs, kBatch)) ++width_log2;
        batches_per_chunk = rounded_up(own_inputs, kBatchLog2);
        const int own_chunks = rounded_up(num_chunks << sharing_log2, kTeamsLog2);
        num_pairs = min(kBatch, own_chunks << width_log2);
        num_rounds = rounded_up(own_chunks << width_log2, kBatchLog2);
    }
    __device__ static int rounded_up(int x, int log2) { return (x + (1 << log2) - 1) >> log2; }

    // Where the team is on its way: in which round, and in which batch of its chunk.
    struct Step {
        int round = 0, batch = 0;
        bool odd = false;
    };
    __device__ bool next(Step& step) const {
        step.odd = !step.odd;
        if (++step.batch == batches_per_chunk) {
            step.batch = 0;
            ++step.round;
        }
        return step.round < num_rounds;
    }

    // The chunk of a pair.
    __device__ int chunk_of(const Step& step, int pair) const {
        const int own = (step.round << kBatchLog2) + pair >> width_log2;
        return team + own * kTeams >> sharing_log2;
    }

    __device__ void merge() const {
        Step step, ahead;
        Pair pair = copy(ahead), pair_ahead;
        mk::ptx::commit_copies();
        Sum sum;
        for (bool more = true; more; pair = pair_ahead, step = ahead) {
            more = next(ahead);
            if (more) pair_ahead = copy(ahead);
            mk::ptx::commit_copies();
            mk::ptx::wait_copies<1>();
            add(step, pair, sum);
        }
        if (sharing_log2 > 0) add_up_shared(sum);
    }

    // ---- copies -----------------------------------------------------------------------

    // This thread's places for pairs, in a page as many as kPagePairs.
    static constexpr int kPagePairs = kBatch * kBatchesAhead / Pages::kStaging;
    static constexpr uint32_t kPlaceStep = kConsumerThreads * sizeof(float4);
    static_assert(kPagePairs * kPlaceStep <= Config::kSmemPageBytes);
    __device__ uint32_t place(const Step& step, int pair) const {
        const int at = step.odd * kBatch + pair;
        return mk::ptx::smem_address(state.page(at / kPagePairs)) + at % kPagePairs * kPlaceStep +
               threadIdx.x * static_cast<uint32_t>(sizeof(float4));
    }

    // Begins with the copies of a batch; past L1, where a line may be that of an earlier launch.
    __device__ Pair copy(const Step& step) const {
        const Pair pair = look_up(step);
        const float* columns = g.o_scratch + lane * kColumnsPerThread;
#pragma unroll 1
        for (int first = 0; first < num_pairs; first += kPagePairs) {
            const uint32_t to = place(step, first);
#pragma unroll
            for (int i = 0; i < kPagePairs; ++i) {
                const int source = __shfl_sync(~0u, pair.source, first + i, kTeamThreads);
                mk::ptx::copy_16_bytes_or_zeros(
                    source >= 0,
                    to + i * kPlaceStep,
                    columns + static_cast<int64_t>(max(source, 0)) * kColumnChunk);
            }
        }
        return pair;
    }
    __device__ Pair look_up(const Step& step) const {
        const int own_chunk = chunk_of(step, lane);
        const int own_input = step.batch * kBatch + (lane & (1 << width_log2) - 1);
        const int input = (own_input << sharing_log2) + (team & (1 << sharing_log2) - 1);
        if (own_chunk >= work.num_chunks() || input >= work.num_inputs) return {-1, -INFINITY};
        const int row = work.row_of_chunk(own_chunk);
        const int col = work.col_begin / kColumnChunk + own_chunk - row * work.chunks_per_row();
        const int at = work.slot(input) * g.slot_rows + (work.first_row + row) % kMaxRows;
        return {at * (kLatentDim / kColumnChunk) + col, __ldcg(g.lse_log2_scratch + at)};
    }

    // ---- sums -------------------------------------------------------------------------

    // Maximum over neighbouring lanes of a team.
    __device__ static float max_of(float x, int lanes_log2) {
        for (int i = 0; i < lanes_log2; ++i) {
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 1 << i, kTeamThreads));
        }
        return x;
    }
    // Of something relative to 2^own in a sum relative to 2^top; those that saw no key have none.
    __device__ static float weight_of(float own, float top) {
        return own == -INFINITY ? 0.f : mk::ptx::exp2_approx(own - top);
    }

    // Adds a batch to the sum of its chunk, or sums and stores its chunks one by one.
    __device__ void add(const Step& step, const Pair& pair, Sum& sum) const {
        const bool begins = step.batch == 0, ends = step.batch + 1 == batches_per_chunk;
        float top = max_of(pair.lse_log2, width_log2);
        if (!begins) top = fmaxf(top, sum.top);
        const float weight = weight_of(pair.lse_log2, top);
        const int width = 1 << width_log2, at_once = min(width, kPagePairs);
#pragma unroll 1
        for (int first = 0; first < num_pairs; first += at_once) {
            if ((first & width - 1) == 0) {
                if (begins) sum.begin();
                sum.rescale(__shfl_sync(~0u, top, first, kTeamThreads));
            }
            const uint32_t from = place(step, first);
#pragma unroll 4
            for (int i = 0; i < at_once; ++i) {
                const float own = __shfl_sync(~0u, weight, first + i, kTeamThreads);
                sum.add(mk::ptx::load_smem_float4(from + i * kPlaceStep), own);
                sum.total += own;
            }
            if (!ends || sharing_log2 > 0 || (first + at_once & width - 1) != 0) continue;
            const int own_chunk = chunk_of(step, first);
            if (own_chunk < work.num_chunks()) store(own_chunk, sum);
        }
    }

    // Each of the teams that share a chunk has summed its inputs; the first of them adds up.
    __device__ void add_up_shared(const Sum& own) const {
        Scratch& shared = scratch(state);
        shared.value[team][lane] = own.value;
        if (lane == 0) {
            shared.top[team] = own.top;
            shared.total[team] = own.total;
        }
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        const int sharing = 1 << sharing_log2, first = team & -sharing;
        const int other = first + (lane & sharing - 1);
        const float top = max_of(shared.top[other], sharing_log2);
        const float weight = weight_of(shared.top[other], top);
        const float total = weight * shared.total[other];
        Sum sum;
        sum.begin();
        sum.top = top;
#pragma unroll 4
        for (int i = 0; i < sharing; ++i) {
            sum.total += __shfl_sync(~0u, total, i, kTeamThreads);
            sum.add(shared.value[first + i][lane], __shfl_sync(~0u, weight, i, kTeamThreads));
        }
        const int own_chunk = team >> sharing_log2;
        if (team == first && own_chunk < work.num_chunks()) store(own_chunk, sum);
    }

    // ---- results ----------------------------------------------------------------------

    // While the inputs are not there yet.
    __device__ static void note_sinks(const MlaGlobals& g, const State& state, const Work& work) {
        const int row = threadIdx.x;
        if (row < work.num_rows) {
            float sink_log2 = -INFINITY;
            if (g.attn_sink != nullptr && !writes_scratch(work.dst_batch)) {
                const int flat = work.flat_row + row;
                sink_log2 = g.sink_log2(flat / g.num_heads, flat % g.num_heads);
            }
            scratch(state).sink_log2[row] = sink_log2;
        }
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
    }

    __device__ void store(int chunk, const Sum& sum) const {
        const int row = work.row_of_chunk(chunk);
        const int col = work.col_begin + (chunk - row * work.chunks_per_row()) * kColumnChunk +
                        lane * kColumnsPerThread;
        const bool seen = sum.total > 0.f;  // did any input see a key
        Scratch& shared = scratch(state);
        if (col == work.col_begin) {
            shared.lse_log2[row] = seen ? sum.top + __log2f(sum.total) : -INFINITY;
        }
        const float sink = mk::ptx::exp2_approx(shared.sink_log2[row] - sum.top);
        const float scale = seen ? mk::ptx::reciprocal_approx(sum.total + sink) : 0.f;
        const float4 v = {
            sum.value.x * scale, sum.value.y * scale, sum.value.z * scale, sum.value.w * scale};
        if (writes_scratch(work.dst_batch)) {
            const int64_t at = g.scratch_row(scratch_slot(work.dst_batch), work.first_row + row);
            *reinterpret_cast<float4*>(&g.o_scratch[at * kLatentDim + col]) = v;
            return;
        }
        const int64_t at = static_cast<int64_t>(work.flat_row + row) * kLatentDim;
        const uint2 rounded = {round_pair({v.x, v.y}, Element{}),
                               round_pair({v.z, v.w}, Element{})};
        *reinterpret_cast<uint2*>(reinterpret_cast<Element*>(g.out) + at + col) = rounded;
    }

    __device__ static void store_lses(const MlaGlobals& g, const State& state, const Work& work) {
        const int row = threadIdx.x;
        if (row >= work.num_rows) return;
        const float lse_log2 = scratch(state).lse_log2[row];
        if (writes_scratch(work.dst_batch)) {
            const int slot = scratch_slot(work.dst_batch);
            g.lse_log2_scratch[g.scratch_row(slot, work.first_row + row)] = lse_log2;
        } else if (work.col_begin == 0) {
            const int flat = work.flat_row + row;
            g.store_lse(flat / g.num_heads, flat % g.num_heads, lse_log2);
        }
    }
};

}  // namespace mla
