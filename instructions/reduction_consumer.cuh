// The consumers of a reduction. They merge in one of three ways: straight from L2 what is stamped
// and little enough, else in pages, by how much there is.
#pragma once

#include "instructions/chunk_merge.cuh"
#include "instructions/row_merge.cuh"
#include "instructions/stamped_merge.cuh"

namespace mla {

template <class Config>
class ReductionConsumer {
    using State = mk::State<Config>;
    using Result = ReductionResult<Config>;
    using Teams = ChunkTeams<Config>;

  public:
    __device__ static void run(const MlaGlobals& g, const State& state) {
        const ReductionWork work(g, state.words(), Config::kRows);
        Scratch& scratch = *reinterpret_cast<Scratch*>(state.scratch());
        const Result result(g, work, scratch.result);
        result.note_sinks();
        merge(g, state, work, result, scratch);
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        result.store_lses();
        if (threadIdx.x == 0) {
            release_pages(state);
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
            typename Teams::Scratch teams;
            typename RowMerge<Config>::Scratch rows;
        };
    };
    static_assert(sizeof(Scratch) <= Config::kScratchBytes);

    // (How the ways are told apart stands here twice: one tail for both makes kernels without
    // stamps half a percent slower on an H200.)
    __device__ static void merge(const MlaGlobals& g,
                                 const State& state,
                                 const ReductionWork& work,
                                 const Result& result,
                                 Scratch& scratch) {
        const Teams teams(g, state, work, result, scratch.teams);
        typename Teams::Sum sum;
        if constexpr (Config::kStampsResults) {
            bool is_left = true;  // what teams have summed has to be written
            if (mk::ptx::as_written(StampedMerge<Config>::is_for(teams))) {
                StampedMerge<Config>(g, state, teams).merge(sum);
                state.wait(kPagesFree, 0);
            } else {
                state.wait(kPagesFree, 0);
                is_left = !RowMerge<Config>::is_for(work);
                if (mk::ptx::as_written(is_left)) {
                    is_left = ChunkMerge<Config>(g, state, teams).merge(sum);
                } else {
                    RowMerge<Config>(g, state, work, result, scratch.rows).merge();
                }
                mk::ptx::fence_proxy_async_smem();
            }
            if (is_left) teams.finish(sum);
        } else {
            state.wait(kPagesFree, 0);
            if (mk::ptx::as_written(!RowMerge<Config>::is_for(work))) {
                if (ChunkMerge<Config>(g, state, teams).merge(sum)) teams.finish(sum);
            } else {
                RowMerge<Config>(g, state, work, result, scratch.rows).merge();
            }
            mk::ptx::fence_proxy_async_smem();
        }
    }

    __device__ static void release_pages(const State& state) {
        for (int page = 0; page < Config::kNumSmemPages; ++page) {
            state.release_page(page, Config::kPageReleaseArrivals);
        }
    }
};

}  // namespace mla
