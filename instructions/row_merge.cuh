// A merge by whole rows of the slice, several at a time: for much to merge, whose inputs' columns
// would take a team turn after turn.
//
// The copy engine brings the first rows of all inputs into the first third of the pages, the next
// rows into the second, and so on in turns. Meanwhile all LSEs become weights, and then each thread
// sums four columns of a row after the other.
#pragma once

#include "instructions/reduction_result.cuh"

namespace mla {

template <class Config>
class RowMerge {
    using State = mk::State<Config>;
    using Work = ReductionWork;
    using Result = ReductionResult<Config>;

    static constexpr int kPlaces = kReductionBatches;
    static constexpr int kPlaceBytes =
        Config::kNumSmemPages / kPlaces * static_cast<int>(Config::kSmemPageBytes);
    static constexpr int kWarps = Config::kNumConsumerWarps;
    static constexpr int kTogether = 4;  // inputs that a thread reads at a time
    static constexpr int kMostInputs = mk::kWarpThreads;
    static constexpr int kMostWeights = 2048;
    static constexpr int kLeastBytes = 26 * 1024;  // less is merged faster by chunks

  public:
    struct Scratch {
        alignas(float4) float weight[kMostWeights];  // [row][input, padded]; first LSEs
    };

    __device__ static bool is_for(const Work& work) {
        const int of_a_row = work.num_inputs * row_bytes(work);
        return work.num_rows * of_a_row > kLeastBytes && 2 * of_a_row <= kPlaceBytes &&
               work.num_inputs <= kMostInputs &&
               work.num_rows * padded(work.num_inputs) <= kMostWeights;
    }

    __device__ RowMerge(const MlaGlobals& g,
                        const State& state,
                        const Work& work,
                        const Result& result,
                        Scratch& shared)
        : g(g),
          state(state),
          work(work),
          result(result),
          shared(shared),
          rows_at_once(kPlaceBytes / (work.num_inputs * row_bytes(work))) {}

    __device__ void merge() const {
        ask_for_first();
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        weigh();
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        int place = 0, phase = 0;
#pragma unroll 1
        for (int row = 0; row < work.num_rows; row += rows_at_once) {
            state.wait(kBatchCopied + place, phase);
            if (row == 0 && threadIdx.x == 0) state.record(mk::TimingWord::kComputeBegin);
            add_up(place, row);
            const int next = row + kPlaces * rows_at_once;
            if (next < work.num_rows) {
                mk::ptx::fence_proxy_async_smem();  // all have read what lies there
                barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
                expect(place, next);
                if (has_input()) copy(place, next, work.slot(own_input()));
            }
            if (++place == kPlaces) {
                place = 0;
                ++phase;
            }
        }
    }

  private:
    const MlaGlobals& g;
    const State& state;
    const Work& work;
    const Result& result;
    Scratch& shared;
    const int rows_at_once;

    __device__ static int row_bytes(const Work& work) {
        return work.num_cols * static_cast<int>(sizeof(float));
    }
    __device__ int rows_from(int row) const { return min(rows_at_once, work.num_rows - row); }
    __device__ static uint32_t address(int place) {
        return mk::ptx::smem_address(mk::smem_base()) + place * kPlaceBytes;
    }
    __device__ static int padded(int inputs) { return (inputs + kTogether - 1) & -kTogether; }
    __device__ float* weights(int row) const {
        return shared.weight + row * padded(work.num_inputs);
    }

    // ---- inputs -----------------------------------------------------------------------

    // The warps take turns with the inputs, a lane looks after one.
    static constexpr int kWarpInputs = kMostInputs / kWarps;
    __device__ static int warp() { return threadIdx.x / mk::kWarpThreads; }
    __device__ static int lane() { return threadIdx.x % mk::kWarpThreads; }
    __device__ static int own_input() { return warp() + lane() * kWarps; }
    __device__ bool has_input() const { return own_input() < work.num_inputs; }

    // As the inputs come, all places are filled; then all LSEs are fetched.
    __device__ void ask_for_first() const {
#pragma unroll 1
        for (int place = 0; place < kPlaces; ++place) expect(place, place * rows_at_once);
        const int slot = has_input() ? work.slot(own_input()) : 0;
        state.watch_done_flags(g.done_flags, slot, has_input(), false, [&] {
            mk::ptx::fence_proxy_async_global();
#pragma unroll 1
            for (int place = 0; place < kPlaces; ++place) copy(place, place * rows_at_once, slot);
        });
        if (is_first_lane()) state.arrive(kInputsSeen);
        const int which = lane() % kWarpInputs, input = warp() + which * kWarps;
        const float* from =
            g.lse_log2_scratch + g.scratch_row(__shfl_sync(~0u, slot, which), work.first_row);
        if (input >= work.num_inputs) return;
#pragma unroll 4
        for (int row = lane() / kWarpInputs; row < work.num_rows;
             row += mk::kWarpThreads / kWarpInputs) {
            // Past L1: a line may have been read in an earlier launch.
            weights(row)[input] = __ldcg(from + row);
        }
    }
    // Of the warp's inputs, rows from `row` on.
    __device__ void expect(int place, int row) const {
        const int inputs = (work.num_inputs - warp() + kWarps - 1) / kWarps;
        if (is_first_lane()) {
            mk::ptx::mbar_arrive_expect_tx(state.semaphore(kBatchCopied + place),
                                           inputs * max(rows_from(row), 0) * row_bytes(work));
        }
        __syncwarp();
    }
    // Of the lane's. A place lies as [input][row][column].
    __device__ void copy(int place, int row, int slot) const {
        const int rows = rows_from(row);
        // Rows that follow each other in the slot are one copy.
        const int together = work.num_cols == kLatentDim ? rows : 1;
        uint32_t to = address(place) + own_input() * rows * row_bytes(work);
        const float* from =
            g.o_scratch + g.scratch_row(slot, work.first_row + row) * kLatentDim + work.col_begin;
#pragma unroll 1
        for (int i = 0; i < rows; i += together) {
            mk::ptx::bulk_load(to,
                               from,
                               together * row_bytes(work),
                               state.semaphore(kBatchCopied + place),
                               mk::ptx::kEvictFirst);
            to += together * row_bytes(work);
            from += together * kLatentDim;
        }
    }

    // ---- sums -------------------------------------------------------------------------

    // Over 2^lanes_log2 neighbouring lanes.
    template <class Combine>
    __device__ static float over_lanes(float x, int lanes_log2, Combine combine) {
#pragma unroll 1
        for (int i = 0; i < lanes_log2; ++i) x = combine(x, __shfl_xor_sync(~0u, x, 1 << i));
        return x;
    }
    // LSEs become weights with all that a row's sum is multiplied with; of inputs that there are
    // not they are 0.
    __device__ void weigh() const {
        int lanes_log2 = 2;
        while (1 << lanes_log2 < work.num_inputs) ++lanes_log2;
        const int input = threadIdx.x & (1 << lanes_log2) - 1;
#pragma unroll 1
        for (int first = 0; first < work.num_rows; first += kConsumerThreads >> lanes_log2) {
            const int row = first + (threadIdx.x >> lanes_log2);
            const bool exists = row < work.num_rows;
            const float lse_log2 =
                exists && input < work.num_inputs ? weights(row)[input] : -INFINITY;
            const float top =
                over_lanes(lse_log2, lanes_log2, [](float x, float y) { return fmaxf(x, y); });
            const float own = weight_of(lse_log2, top);
            const float total = over_lanes(own, lanes_log2, [](float x, float y) { return x + y; });
            if (!exists) continue;
            if (input < padded(work.num_inputs)) {
                weights(row)[input] = own * result.scale_of(row, top, total);
            }
            if (input == 0) result.note_lse(row, top, total);
        }
    }

    __device__ void add_up(int place, int first) const {
        const int rows = rows_from(first), row_vectors = work.num_cols / kVectorColumns;
        const int step = rows * row_bytes(work);
#pragma unroll 1
        for (int at = threadIdx.x; at < rows * row_vectors; at += kConsumerThreads) {
            const int row = work.row_of_chunk(at / (kColumnChunk / kVectorColumns));
            const float* weight = weights(first + row);
            const uint32_t from = address(place) + at * static_cast<uint32_t>(sizeof(float4));
            float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
            for (int input = 0; input < work.num_inputs; input += kTogether) {
                const float4 w = *reinterpret_cast<const float4*>(weight + input);
                const float own[kTogether] = {w.x, w.y, w.z, w.w};
                float4 columns[kTogether];
#pragma unroll
                for (int i = 0; i < kTogether; ++i) {
                    const int there = min(input + i, work.num_inputs - 1);
                    columns[i] = Result::columns_of_input(from + there * step);
                }
#pragma unroll
                for (int i = 0; i < kTogether; ++i) add_weighted(sum, columns[i], own[i]);
            }
            const int col = (at - row * row_vectors) * kVectorColumns;
            result.store(first + row, col, sum, result.noted_lse(first + row));
        }
    }
};

}  // namespace mla
