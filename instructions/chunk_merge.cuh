// A merge by chunks of 64 columns of one row: sixteen teams of sixteen threads sum chunks over the
// inputs; where there are fewer chunks than teams, several teams share one. For few rows, for many
// inputs, and for little.
//
// The copy engine brings the inputs from L2 into pages, up to three batches at a time. The code
// stays a few short loops: it runs once or twice in a launch, and such code costs what its
// instructions cost to fetch.
#pragma once

#include "instructions/reduction_result.cuh"

namespace mla {

template <class Config>
class ChunkMerge {
    using State = mk::State<Config>;
    using Work = ReductionWork;
    using Result = ReductionResult<Config>;

    static constexpr int kTeamThreads = kColumnChunk / kVectorColumns;
    static constexpr int kTeamsLog2 = 4;
    static constexpr int kTeams = 1 << kTeamsLog2;
    static_assert(kTeams * kTeamThreads == kConsumerThreads);
    // (chunk, input) pairs of a team that are copied at a time: lane i looks after the i-th.
    static constexpr int kBatchLog2 = 4;
    static constexpr int kBatch = 1 << kBatchLog2;
    static_assert(kBatch == kTeamThreads);
    static constexpr int kBatchesAtOnce = kReductionBatches;

  public:
    struct Scratch {
        float4 value[kTeams][kTeamThreads];
        float top[kTeams], total[kTeams];
    };

    __device__ ChunkMerge(const MlaGlobals& g,
                          const State& state,
                          const Work& work,
                          const Result& result,
                          Scratch& shared)
        : g(g), state(state), work(work), result(result), shared(shared) {
        const int num_chunks = work.num_chunks(), num_inputs = work.num_inputs;
        sharing_log2 = 0;
        while (num_chunks << sharing_log2 + 1 <= kTeams && 1 << sharing_log2 < num_inputs) {
            ++sharing_log2;
        }
        own_inputs = rounded_up(num_inputs, sharing_log2);
        width_log2 = 0;
        while (1 << width_log2 < min(own_inputs, kBatch)) ++width_log2;
        batches_per_chunk = rounded_up(own_inputs, kBatchLog2);
        const int own_chunks = rounded_up(num_chunks << sharing_log2, kTeamsLog2);
        num_pairs = min(kBatch, own_chunks << width_log2);
        num_turns = rounded_up(own_chunks << width_log2, kBatchLog2);
    }

    // Batch by batch, with the copies of the next ones on their way.
    __device__ void merge() const {
        Step step, ahead;
        float lse_log2[kBatchesAtOnce];  // of the lane's pair, -inf if there is none
        Sum sum;
        for (int begun = 1; step.turn < num_turns; ++begun) {
#pragma unroll
            for (int i = 0; i + 1 < kBatchesAtOnce; ++i) lse_log2[i] = lse_log2[i + 1];
            lse_log2[kBatchesAtOnce - 1] = copy_next(ahead);
            if (begun < kBatchesAtOnce) continue;
            if (step.index == 0 && threadIdx.x == 0) state.record(mk::TimingWord::kComputeBegin);
            state.wait(kBatchCopied + step.place(), step.phase());
            if (sharing_log2 == 0 && batches_per_chunk == 1) {
                finish_chunks(step, lse_log2[0]);
            } else {
                add_batch(step, lse_log2[0], sum);
                if (sharing_log2 == 0 && step.batch + 1 == batches_per_chunk) {
                    finish_chunk(chunk_of(step, 0), sum);
                }
            }
            advance(step);
        }
        if (sharing_log2 > 0) add_up_shared(sum);
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
    };

    const MlaGlobals& g;
    const State& state;
    const Work& work;
    const Result& result;
    Scratch& shared;
    const int team = threadIdx.x / kTeamThreads, lane = threadIdx.x % kTeamThreads;
    // Powers of two, by their logarithms: what runs once has no time for divisions.
    int sharing_log2;       // teams that share a chunk
    int own_inputs;         // of each of them
    int width_log2;         // inputs of a chunk that a batch holds, padded
    int num_pairs;          // of a batch, those included
    int batches_per_chunk;  // more than one only if a batch holds a single chunk
    int num_turns;          // at chunks_at_once; as many for all teams

    __device__ static int rounded_up(int x, int log2) { return (x + (1 << log2) - 1) >> log2; }

    // Where the team is on its way: in which turn, and in which batch of its chunk.
    struct Step {
        int index = 0;  // of the batch, counted from the first on
        int turn = 0, batch = 0;
        __device__ int place() const { return index % kBatchesAtOnce; }
        __device__ int phase() const { return index / kBatchesAtOnce; }
    };
    __device__ void advance(Step& step) const {
        ++step.index;
        if (++step.batch == batches_per_chunk) {
            step.batch = 0;
            ++step.turn;
        }
    }

    // Teams side by side have chunks side by side, as many as there are if they are shared.
    __device__ int side_by_side() const { return kTeams >> sharing_log2; }
    // The chunk of a pair.
    __device__ int chunk_of(const Step& step, int pair) const {
        const int own = (step.turn << kBatchLog2) + pair >> width_log2;
        return (team & side_by_side() - 1) + own * kTeams;
    }
    // Which of the inputs of a shared chunk are this team's: own_inputs from part * own_inputs on.
    __device__ int part() const { return team >> kTeamsLog2 - sharing_log2; }

    // ---- copies -----------------------------------------------------------------------

    // Where in a batch's place a pair's columns are put, those of all teams side by side.
    static constexpr int kPagePairs = kBatch * kBatchesAtOnce / Config::kNumSmemPages;
    static constexpr uint32_t kChunkBytes = kColumnChunk * sizeof(float);
    static constexpr uint32_t kPairStep = kTeams * kChunkBytes;
    static_assert(kPagePairs * kPairStep <= Config::kSmemPageBytes);
    __device__ uint32_t address(const Step& step, int pair) const {
        const int at = step.place() * kBatch + pair;
        return mk::ptx::smem_address(state.page(at / kPagePairs)) + at % kPagePairs * kPairStep +
               team * kChunkBytes;
    }

    // Begins with the copies of the next batch, if there is one.
    __device__ float copy_next(Step& step) const {
        if (step.turn >= num_turns) return -INFINITY;
        if (step.index >= kBatchesAtOnce) {  // all have read what lies there
            mk::ptx::fence_proxy_async_smem();
            barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        }
        const float lse_log2 = copy(step);
        advance(step);
        if (step.turn == num_turns && is_first_lane()) state.arrive(kInputsSeen);
        return lse_log2;
    }
    // The lane's pair. Where chunks of teams side by side follow each other in a row, one copy of
    // an input is for all; the teams take turns with the inputs.
    __device__ float copy(const Step& step) const {
        const int own_chunk = chunk_of(step, lane);
        const int own_input = step.batch * kBatch + (lane & (1 << width_log2) - 1);
        const int input = part() * own_inputs + own_input;
        const bool exists = lane < num_pairs && own_chunk < work.num_chunks() &&
                            own_input < own_inputs && input < work.num_inputs;
        uint32_t bytes = 0;
        int slot = 0, at = 0, chunks_before = 0;
        const float* columns = nullptr;
        if (exists) {
            const int row = work.row_of_chunk(own_chunk);
            const int col = own_chunk - row * work.chunks_per_row();
            slot = work.slot(input);
            at = slot * g.slot_rows + work.first_row + row;
            columns = g.o_scratch + static_cast<int64_t>(at) * kLatentDim + work.col_begin +
                      col * kColumnChunk;
            const int place = team & side_by_side() - 1;
            chunks_before = min(place, col);
            const int chunks =
                chunks_before + min(work.chunks_per_row() - col,
                                    min(side_by_side() - place, work.num_chunks() - own_chunk));
            const int turns = 1 << 31 - __clz(chunks);
            if ((own_input & turns - 1) == chunks_before) bytes = chunks * kChunkBytes;
        }
        const uint32_t copied = state.semaphore(kBatchCopied + step.place());
        const uint32_t warp_bytes = __reduce_add_sync(~0u, bytes);
        if (is_first_lane()) mk::ptx::mbar_arrive_expect_tx(copied, warp_bytes);
        __syncwarp();
        float lse_log2 = -INFINITY;
        // Later turns are other chunks of the same inputs.
        const bool known = step.turn > 0;
        state.watch_done_flags(g.done_flags, slot, exists, known, [&] {
            mk::ptx::fence_proxy_async_global();
            if (bytes > 0) {
                mk::ptx::bulk_load(address(step, lane) - chunks_before * kChunkBytes,
                                   columns - chunks_before * kColumnChunk,
                                   bytes,
                                   copied,
                                   mk::ptx::kEvictFirst);
            }
            // Past L1: a line may have been read in an earlier launch.
            lse_log2 = __ldcg(g.lse_log2_scratch + at);
        });
        return lse_log2;
    }

    // ---- sums -------------------------------------------------------------------------

    // Over 2^lanes_log2 neighbouring lanes of a team.
    __device__ static float max_of(float x, int lanes_log2) {
#pragma unroll
        for (int i = 0; i < kBatchLog2; ++i) {
            const float other = __shfl_xor_sync(~0u, x, 1 << i, kTeamThreads);
            if (i < lanes_log2) x = fmaxf(x, other);
        }
        return x;
    }
    __device__ static float sum_of(float x, int lanes_log2) {
#pragma unroll
        for (int i = 0; i < kBatchLog2; ++i) {
            const float other = __shfl_xor_sync(~0u, x, 1 << i, kTeamThreads);
            if (i < lanes_log2) x += other;
        }
        return x;
    }
    // This thread's columns of a batch's pairs, one after the other: use(pair, columns, weight).
    template <class Use>
    __device__ void for_each_pair(const Step& step, float weight, Use use) const {
#pragma unroll 1
        for (int first = 0; first < num_pairs; first += kPagePairs) {
            const int count = min(kPagePairs, num_pairs - first);
            const uint32_t from =
                address(step, first) + lane * static_cast<uint32_t>(sizeof(float4));
#pragma unroll 1
            for (int begin = 0; begin < count; begin += 4) {
#pragma unroll
                for (int i = begin; i < begin + 4; ++i) {
                    const float4 columns = mk::ptx::load_smem_float4(from + i * kPairStep);
                    const float own = __shfl_sync(~0u, weight, first + i, kTeamThreads);
                    if (i < count) use(first + i, columns, own);
                }
            }
        }
    }

    // Chunks that have all their inputs in a batch: lane i does for the i-th pair what its columns
    // have in common.
    __device__ void finish_chunks(const Step& step, float lse_log2) const {
        const float top = max_of(lse_log2, width_log2);
        const float own = weight_of(lse_log2, top);
        const float total = sum_of(own, width_log2);
        const float scale = scale_of(chunk_of(step, lane), top, total);
        float4 value;
        for_each_pair(step, own * scale, [&](int pair, const float4& columns, float weight) {
            const int mask = (1 << width_log2) - 1;
            if ((pair & mask) == 0) value = {0.f, 0.f, 0.f, 0.f};
            add_weighted(value, columns, weight);
            if ((pair & mask) == mask) store(chunk_of(step, pair), value);
        });
    }

    // One batch of several of a chunk.
    __device__ void add_batch(const Step& step, float lse_log2, Sum& sum) const {
        if (step.batch == 0) sum.begin();
        const float top = fmaxf(max_of(lse_log2, kBatchLog2), sum.top);
        const float own = weight_of(lse_log2, top);
        sum.rescale(top);
        sum.total += sum_of(own, kBatchLog2);
        for_each_pair(step, own, [&](int, const float4& columns, float weight) {
            add_weighted(sum.value, columns, weight);
        });
    }

    // Each of the teams that share a chunk has summed its inputs; the first of them adds up.
    __device__ void add_up_shared(const Sum& own) const {
        shared.value[team][lane] = own.value;
        if (lane == 0) {
            shared.top[team] = own.top;
            shared.total[team] = own.total;
        }
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        const int first = team & side_by_side() - 1;
        const int other = first + (lane & (1 << sharing_log2) - 1) * side_by_side();
        const float top = max_of(shared.top[other], sharing_log2);
        const float weight = weight_of(shared.top[other], top);
        Sum sum;
        sum.begin();
        sum.top = top;
        sum.total = sum_of(weight * shared.total[other], sharing_log2);
#pragma unroll 4
        for (int i = 0; i < 1 << sharing_log2; ++i) {
            add_weighted(sum.value,
                         shared.value[first + i * side_by_side()][lane],
                         __shfl_sync(~0u, weight, i, kTeamThreads));
        }
        if (part() == 0) finish_chunk(first, sum);
    }

    // ---- results ----------------------------------------------------------------------

    __device__ void finish_chunk(int chunk, Sum& sum) const {
        const float scale = scale_of(chunk, sum.top, sum.total);
        float4 value = {0.f, 0.f, 0.f, 0.f};
        add_weighted(value, sum.value, scale);
        store(chunk, value);
    }

    // What a chunk's sum is multiplied with; notes its row's LSE.
    __device__ float scale_of(int chunk, float top, float total) const {
        if (chunk >= work.num_chunks()) return 0.f;
        const int row = work.row_of_chunk(chunk);
        if (chunk == row * work.chunks_per_row()) result.note_lse(row, top, total);
        return result.scale_of(row, top, total);
    }

    __device__ void store(int chunk, const float4& columns) const {
        if (chunk >= work.num_chunks()) return;
        const int row = work.row_of_chunk(chunk);
        const int col = (chunk - row * work.chunks_per_row()) * kColumnChunk;
        result.store(row, col + lane * kVectorColumns, columns);
    }
};

}  // namespace mla
