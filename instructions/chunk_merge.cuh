// A merge by chunks, see chunk_teams.cuh. For few rows, for many inputs, and for little.
//
// The copy engine brings the inputs from L2 into pages, up to three batches at a time. The code
// stays a few short loops: it runs once or twice in a launch, and such code costs what its
// instructions cost to fetch.
#pragma once

#include "instructions/chunk_teams.cuh"

namespace mla {

template <class Config>
class ChunkMerge {
    using State = mk::State<Config>;
    using Teams = ChunkTeams<Config>;
    using Sum = typename Teams::Sum;
    using Result = typename Teams::Result;
    static constexpr int kTeamThreads = Teams::kTeamThreads;
    static constexpr int kTeams = Teams::kTeams;

    // (chunk, input) pairs of a team that are copied at a time: lane i looks after the i-th.
    static constexpr int kBatchLog2 = 4;
    static constexpr int kBatch = 1 << kBatchLog2;
    static_assert(kBatch == kTeamThreads);
    static constexpr int kBatchesAtOnce = kReductionBatches;

  public:
    __device__ ChunkMerge(const MlaGlobals& g, const State& state, const Teams& teams)
        : g(g), state(state), work(teams.work), teams(teams) {
        width_log2 = 0;
        while (1 << width_log2 < min(teams.own_inputs, kBatch)) ++width_log2;
        batches_per_chunk = Teams::rounded_up(teams.own_inputs, kBatchLog2);
        const int own_chunks =
            Teams::rounded_up(work.num_chunks() << teams.sharing_log2, Teams::kTeamsLog2);
        num_pairs = min(kBatch, own_chunks << width_log2);
        num_turns = Teams::rounded_up(own_chunks << width_log2, kBatchLog2);
    }

    // Batch by batch, with the copies of the next ones on their way. False: all has been written.
    // True: of a chunk that teams share, each has summed its inputs.
    __device__ bool merge(Sum& sum) const {
        Step step, ahead;
        float lse_log2[kBatchesAtOnce];  // of the lane's pair, -inf if there is none
        for (int begun = 1; step.turn < num_turns; ++begun) {
#pragma unroll
            for (int i = 0; i + 1 < kBatchesAtOnce; ++i) lse_log2[i] = lse_log2[i + 1];
            lse_log2[kBatchesAtOnce - 1] = copy_next(ahead);
            if (begun < kBatchesAtOnce) continue;
            if (step.index == 0 && threadIdx.x == 0) state.record(mk::TimingWord::kComputeBegin);
            state.wait(kBatchCopied + step.place(), step.phase());
            if (teams.sharing_log2 == 0 && batches_per_chunk == 1) {
                finish_chunks(step, lse_log2[0]);
            } else {
                add_batch(step, lse_log2[0], sum);
                if (teams.sharing_log2 == 0 && step.batch + 1 == batches_per_chunk) {
                    teams.finish_chunk(chunk_of(step, 0), teams.lane, sum);
                }
            }
            advance(step);
        }
        return teams.sharing_log2 > 0;
    }

  private:
    const MlaGlobals& g;
    const State& state;
    const ReductionWork& work;
    const Teams& teams;
    int width_log2;         // inputs of a chunk that a batch holds, padded
    int num_pairs;          // of a batch, those included
    int batches_per_chunk;  // more than one only if a batch holds a single chunk
    int num_turns;          // at chunks_at_once; as many for all teams

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

    // The chunk of a pair.
    __device__ int chunk_of(const Step& step, int pair) const {
        const int own = (step.turn << kBatchLog2) + pair >> width_log2;
        return teams.first_chunk() + own * kTeams;
    }

    // ---- copies -----------------------------------------------------------------------

    // Where in a batch's place a pair's columns are put, those of all teams side by side.
    static constexpr int kPagePairs = kBatch * kBatchesAtOnce / Config::kNumSmemPages;
    static constexpr uint32_t kChunkBytes = kColumnChunk * sizeof(float);
    static constexpr uint32_t kPairStep = kTeams * kChunkBytes;
    static_assert(kPagePairs * kPairStep <= Config::kSmemPageBytes);
    __device__ uint32_t address(const Step& step, int pair) const {
        const int at = step.place() * kBatch + pair;
        return mk::ptx::smem_address(state.page(at / kPagePairs)) + at % kPagePairs * kPairStep +
               teams.team * kChunkBytes;
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
        const int own_chunk = chunk_of(step, teams.lane);
        const int own_input = step.batch * kBatch + (teams.lane & (1 << width_log2) - 1);
        const int input = teams.part() * teams.own_inputs + own_input;
        const bool exists = teams.lane < num_pairs && own_chunk < work.num_chunks() &&
                            own_input < teams.own_inputs && input < work.num_inputs;
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
            const int place = teams.first_chunk();
            chunks_before = min(place, col);
            const int chunks = chunks_before + min(work.chunks_per_row() - col,
                                                   min(teams.side_by_side() - place,
                                                       work.num_chunks() - own_chunk));
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
                mk::ptx::bulk_load(address(step, teams.lane) - chunks_before * kChunkBytes,
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

    // This thread's columns of a batch's pairs, one after the other: use(pair, columns, weight).
    template <class Use>
    __device__ void for_each_pair(const Step& step, float weight, Use use) const {
#pragma unroll 1
        for (int first = 0; first < num_pairs; first += kPagePairs) {
            const int count = min(kPagePairs, num_pairs - first);
            const uint32_t from =
                address(step, first) + teams.lane * static_cast<uint32_t>(sizeof(float4));
#pragma unroll 1
            for (int begin = 0; begin < count; begin += 4) {
#pragma unroll
                for (int i = begin; i < begin + 4; ++i) {
                    const float4 columns = Result::columns_of_input(from + i * kPairStep);
                    const float own = __shfl_sync(~0u, weight, first + i, kTeamThreads);
                    if (i < count) use(first + i, columns, own);
                }
            }
        }
    }

    // Chunks that have all their inputs in a batch: lane i does for the i-th pair what its columns
    // have in common.
    __device__ void finish_chunks(const Step& step, float lse_log2) const {
        const float top = teams.max_of(lse_log2, width_log2);
        const float own = weight_of(lse_log2, top);
        const float total = teams.sum_of(own, width_log2);
        const float scale = teams.scale_of(chunk_of(step, teams.lane), top, total);
        const float lse_of_chunk = Result::lse_of(top, total);
        float4 value;
        for_each_pair(step, own * scale, [&](int pair, const float4& columns, float weight) {
            const int mask = (1 << width_log2) - 1;
            if ((pair & mask) == 0) value = {0.f, 0.f, 0.f, 0.f};
            add_weighted(value, columns, weight);
            if ((pair & mask) != mask) return;
            float lse = lse_of_chunk;
            if (Config::kStampsResults) lse = __shfl_sync(~0u, lse, pair, kTeamThreads);
            teams.store(chunk_of(step, pair), teams.lane, value, lse);
        });
    }

    // One batch of several of a chunk.
    __device__ void add_batch(const Step& step, float lse_log2, Sum& sum) const {
        if (step.batch == 0) sum.begin();
        const float top = fmaxf(teams.max_of(lse_log2, kBatchLog2), sum.top);
        const float own = weight_of(lse_log2, top);
        sum.rescale(top);
        sum.total += teams.sum_of(own, kBatchLog2);
        for_each_pair(step, own, [&](int, const float4& columns, float weight) {
            add_weighted(sum.value, columns, weight);
        });
    }
};

}  // namespace mla
