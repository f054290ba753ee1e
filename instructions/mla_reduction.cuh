// MLA reduction: merges scratch slots of one row group over a slice of rows and
// columns, weighted by their log-sum-exps.
//
//     loader     waits for the pages
//     consumers  wait for the inputs' flags and sum, see reduction_consumer.cuh
//     launcher   lets the next instruction come when all flags have been seen
//     storer     raises the flag when the result is an input of another reduction
#pragma once

#include "instructions/reduction_consumer.cuh"
#include "megakernel/opcode_list.cuh"

namespace mla {

template <class Config>
struct MlaReduction {
    static constexpr int kOpcode = static_cast<int>(Opcode::kMlaReduction);
    static constexpr mk::Role kPrefetchGate = mk::Role::kLauncher;
    using State = mk::State<Config>;
    static constexpr int kNumSemaphores = kNumReductionSemaphores;

    struct Controller {
        __device__ static int arrival_count(const MlaGlobals&, int semaphore) {
            return semaphore == kPagesFree ? 1 : Config::kNumConsumerWarps;
        }
        __device__ static int released_page(const MlaGlobals&, const int32_t*, int k) { return k; }
    };

    struct Loader {
        __device__ static void run(const MlaGlobals&, State& state) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            if (lane < Config::kNumSmemPages) state.wait_page(lane);
            __syncwarp();
            if (lane == 0) state.arrive(kPagesFree);
        }
    };

    struct Launcher {
        __device__ static void run(const MlaGlobals&, State& state) {
            if (is_first_lane()) state.record(mk::TimingWord::kLoadBegin);
            // The next instruction is drawn when this one has its inputs: who draws ahead of that
            // keeps reductions from SMs that have nothing to do.
            state.wait(kInputsSeen, 0);
            if (is_first_lane()) state.record(mk::TimingWord::kLoadEnd);
        }
    };

    using Consumer = ReductionConsumer<Config>;

    struct Storer {
        __device__ static void run(const MlaGlobals& g, State& state) {
            if (threadIdx.x % mk::kWarpThreads != 0) return;
            const int dst_batch = state.word(ReductionWords::kDstBatch);
            // Nobody waits for rows of the output: a role less to wake before the CTA can leave.
            if (!Config::kTimings && !writes_scratch(dst_batch)) return;
            const bool ok = state.wait(kResultStored, 0);
            state.record(mk::TimingWord::kStoreBegin);
            if (ok && writes_scratch(dst_batch)) {
                state.raise_done_flag(&g.done_flags[scratch_slot(dst_batch)]);
            }
            state.record(mk::TimingWord::kStoreEnd);
        }
    };
};

}  // namespace mla
