// The consumers of a reduction. They merge in one of two ways, by how much there is.
#pragma once

#include "instructions/chunk_merge.cuh"
#include "instructions/row_merge.cuh"

namespace mla {

template <class Config>
class ReductionConsumer {
    using State = mk::State<Config>;
    using Result = ReductionResult<Config>;

  public:
    __device__ static void run(const MlaGlobals& g, const State& state) {
        const ReductionWork work(g, state.words(), Config::kRows);
        Scratch& scratch = *reinterpret_cast<Scratch*>(state.scratch());
        const Result result(g, work, scratch.result);
        result.note_sinks();
        state.wait(kPagesFree, 0);
        if (mk::ptx::as_written(!RowMerge<Config>::is_for(work))) {
            ChunkMerge<Config>(g, state, work, result, scratch.chunks).merge();
        } else {
            RowMerge<Config>(g, state, work, result, scratch.rows).merge();
        }
        mk::ptx::fence_proxy_async_smem();
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        result.store_lses();
        if (threadIdx.x == 0) {
            for (int page = 0; page < Config::kNumSmemPages; ++page) {
                state.release_page(page, Config::kPageReleaseArrivals);
            }
            state.record(mk::TimingWord::kComputeEnd);
        }
        __syncwarp();
        if (threadIdx.x % mk::kWarpThreads == 0) state.arrive(kResultStored);
        // Nobody begins the next instruction's scratch before all have read this one's.
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
    }

  private:
    // Where a partial keeps P, which it has read before its last barrier.
    struct Scratch {
        typename Result::Scratch result;
        union {
            typename ChunkMerge<Config>::Scratch chunks;
            typename RowMerge<Config>::Scratch rows;
        };
    };
    static_assert(sizeof(Scratch) <= Config::kScratchBytes);
};

}  // namespace mla
