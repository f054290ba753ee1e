// The device planner's kernel: one CTA as the team.
#pragma once

#include <cuda_runtime.h>

#include "megakernel/args.h"
#include "megakernel/launch.h"
#include "scheduler/device_plan.h"

namespace mla {

inline constexpr int kDevicePlanThreads = 512;

// `kStateInSmem`: what it is given to work on lies in shared memory.
template <bool kStateInSmem>
class CtaTeam {
  public:
    static constexpr int kThreads = kDevicePlanThreads;
    static constexpr int kLanes = 32;
    static constexpr int kGroups = kThreads / kLanes;
    static_assert(kLanes == device_plan::kSortGroup && kLanes == device_plan::kKeys &&
                      kLanes == device_plan::kCandidates && kGroups <= kLanes,
                  "a warp has a lane for each");

    // Memory that all of its threads share, for write().
    static constexpr int kHeadParts = InstructionHead::kWords / 4;
    static constexpr int kHeadStride = kHeadParts | 1;  // odd: no bank conflicts
    static constexpr int kStageBytes = kThreads * kHeadStride * sizeof(int4);
    __device__ explicit CtaTeam(unsigned char* stage) : stage_(reinterpret_cast<int4*>(stage)) {}

    __device__ int rank() const { return threadIdx.x; }
    __device__ int size() const { return kThreads; }
    __device__ int lane() const { return threadIdx.x % kLanes; }
    __device__ int lanes() const { return kLanes; }
    __device__ int group() const { return threadIdx.x / kLanes; }
    __device__ int num_groups() const { return kGroups; }
    __device__ void sync() const { __syncthreads(); }

    __device__ CutTotals sum(const CutTotals& own) const {
        return {__reduce_add_sync(~0u, own.partials),
                __reduce_add_sync(~0u, own.slots),
                __reduce_add_sync(~0u, own.merges),
                __reduce_add_sync(~0u, own.full)};
    }
    __device__ MatesTotals sum(const MatesTotals& own) const {
        return {__reduce_add_sync(~0u, own.mates),
                __reduce_max_sync(~0u, own.most_log2),
                __reduce_max_sync(~0u, own.most_tiles)};
    }
    __device__ CutTotals total(const CutTotals& own) const {
        return exchange(sum(own), [this](const CutTotals& mine) { return sum(mine); });
    }
    __device__ BatchTotals total(const BatchTotals& own) const {
        const auto reduce = [](const BatchTotals& mine) -> BatchTotals {
            return {__reduce_add_sync(~0u, mine.tiles),
                    __reduce_add_sync(~0u, mine.groups),
                    __reduce_max_sync(~0u, mine.longest),
                    __reduce_add_sync(~0u, mine.num_bad),
                    __reduce_min_sync(~0u, mine.bad_request)};
        };
        return exchange(reduce(own), reduce);
    }

    __device__ int least(const uint32_t* values, int n) const {
        __syncthreads();
        const uint32_t mine = lane() < n ? values[lane()] : UINT32_MAX;
        const uint32_t best = __reduce_min_sync(~0u, mine);
        return 31 - __clz(__ballot_sync(~0u, lane() < n && mine == best));
    }

    // values[0, n) become the sums of what comes before them, values[n] that of all. A few warps
    // are faster than all, which wait for each other.
    __device__ __noinline__ static void prefix_sums(uint32_t* values, int n) {
        constexpr int kScanThreads = 256;
        static_assert(kScanThreads <= kThreads);
        __shared__ uint32_t warp_sums[kScanThreads / kLanes];
        if constexpr (kStateInSmem) __builtin_assume(__isShared(values));
        const uint32_t rank = threadIdx.x, lane = rank % kLanes, warp = rank / kLanes;
        const uint32_t per_thread = (n + kScanThreads - 1) / kScanThreads;
        uint32_t* own = values + rank * per_thread;
        const uint32_t* end = device_plan::smaller(own + per_thread, values + n);
        uint32_t sum = 0, through = 0;  // this thread's; those of its warp up to here
        if (rank < kScanThreads) {
            MLA_SHORT_LOOP
            for (const uint32_t* value = own; value < end; ++value) sum += *value;
            through = sum;
#pragma unroll
            for (uint32_t step = 1; step < kLanes; step *= 2) {
                const uint32_t other = __shfl_up_sync(~0u, through, step);
                if (lane >= step) through += other;
            }
            if (lane == kLanes - 1) warp_sums[warp] = through;
        }
        __syncthreads();
        if (rank < kScanThreads) {
            uint32_t before = __reduce_add_sync(~0u, lane < warp ? warp_sums[lane] : 0);
            before += through - sum;
            MLA_SHORT_LOOP
            for (; own < end; ++own) {
                const uint32_t value = *own;
                *own = before;
                before += value;
            }
            if (rank == kScanThreads - 1) values[n] = before;
        }
        __syncthreads();
    }

    // A stable counting sort. The table counts each key in each group of partials.
    __device__ void sort(const DevicePlanState& s, int n) const {
        const int groups = (n + kLanes - 1) / kLanes;
#pragma unroll 1
        for (int of = group(); of < groups; of += kGroups) {
            const int i = of * kLanes + lane();
            const uint32_t key = i < n ? s.keys[i] % device_plan::kKeys : 0;
            uint32_t like_me = __ballot_sync(~0u, i < n), like_lane = like_me;
#pragma unroll
            for (int bit = 1; bit < device_plan::kKeys; bit *= 2) {
                const uint32_t set = __ballot_sync(~0u, key & bit);
                like_me &= key & bit ? set : ~set;
                like_lane &= lane() & bit ? set : ~set;
            }
            if (i < n) s.places[i] = __popc(like_me & ((1u << lane()) - 1));
            s.sort_table[lane() * groups + of] = __popc(like_lane);
        }
        __syncthreads();
        prefix_sums(s.sort_table, device_plan::kKeys * groups);
#pragma unroll 1
        for (int i = rank(); i < n; i += kThreads) {
            s.places[i] += s.sort_table[s.keys[i] % device_plan::kKeys * groups + i / kLanes];
        }
        // Whoever wrote a place reads it.
    }

    // Eight lanes write one instruction.
    __device__ void write(int32_t* words, int place, const InstructionHead& head) const {
        constexpr int kParts = kInstructionWords / 4;
        int4* mine = stage_ + group() * (kLanes * kHeadStride);
        const auto* parts = reinterpret_cast<const int4*>(head.words);
#pragma unroll
        for (int part = 0; part < kHeadParts; ++part) {
            mine[lane() * kHeadStride + part] = parts[part];
        }
        __syncwarp();
        const int part = lane() % kParts;
#pragma unroll 2
        for (int item = lane() / kParts; item < kLanes; item += kLanes / kParts) {
            const int to = __shfl_sync(~0u, place, item);
            int4 value{0, 0, 0, 0};
            if (part < kHeadParts) value = mine[item * kHeadStride + part];
            if (to >= 0) reinterpret_cast<int4*>(words)[int64_t{to} * kParts + part] = value;
        }
        __syncwarp();
    }

  private:
    // Every warp's total to all, who make one of them. Its memory is used once a plan.
    template <class Totals, class Reduce>
    __device__ Totals exchange(const Totals& of_warp, const Reduce& reduce) const {
        __shared__ Totals totals[kGroups];
        if (lane() == 0) totals[group()] = of_warp;
        __syncthreads();
        return reduce(lane() < kGroups ? totals[lane()] : Totals{});
    }

    int4* const stage_;
};

// `state_memory` is null if shared memory holds the state.
template <bool kStateInSmem>
__global__ void __launch_bounds__(kDevicePlanThreads, 1)
    device_plan_kernel(const __grid_constant__ DevicePlanProblem problem,
                       int32_t* words,
                       unsigned char* state_memory,
                       int32_t* header,
                       mk::FailureRecord* failure) {
    extern __shared__ __align__(16) unsigned char smem[];
    mk::ptx::allow_next_kernel();
    mk::ptx::wait_for_earlier_kernels();
    using Team = CtaTeam<kStateInSmem>;
    DevicePlanState state;
    device_plan_layout(problem, kStateInSmem ? smem + Team::kStageBytes : state_memory, &state);
    const Team team(smem);
    const int num_bad = DevicePlanner<Team>(team, problem, state).run(words, header);
    if (threadIdx.x != 0 || num_bad == 0) return;
    if (atomicCAS_system(&failure->valid, 0, 2) != 0) return;
    failure->wait_kind = static_cast<int32_t>(mk::WaitKind::kBadLength);
    failure->index = header[kHeaderBadRequest];
    failure->expected = problem.limit_of(header[kHeaderBadRequest]);
    failure->seen = header[kHeaderBadLength];
    __threadfence_system();
    *static_cast<volatile int32_t*>(&failure->valid) = 1;
}

// Enqueues the planning of one step. `instructions` holds `capacity` of them.
inline void launch_device_plan(const DevicePlanProblem& stated,
                               int32_t* instructions,
                               int64_t capacity,
                               int32_t* header,
                               int device,
                               cudaStream_t stream) {
    const mk::DeviceGuard guard(device);
    const DevicePlanProblem problem = with_constants(stated);
    const int64_t bytes = device_plan_layout(problem, nullptr, nullptr);
    const bool in_smem = bytes <= kDevicePlanSmemBytes;
    if (capacity < device_plan_rows(problem)) {
        throw std::runtime_error("plan: " + std::to_string(capacity) +
                                 " instructions do not hold any plan of these sizes, which take " +
                                 std::to_string(device_plan_rows(problem)));
    }
    constexpr int kStageBytes = CtaTeam<true>::kStageBytes;
    static std::once_flag prepared;
    std::call_once(prepared, [] {
        for (const auto kernel : {device_plan_kernel<true>, device_plan_kernel<false>}) {
            mk::check_cuda(cudaFuncSetAttribute(kernel,
                                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                kStageBytes + kDevicePlanSmemBytes),
                           "shared memory of the planner");
        }
    });
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1);
    config.blockDim = dim3(kDevicePlanThreads);
    config.dynamicSmemBytes = kStageBytes + (in_smem ? bytes : 0);
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = 1;
    auto* behind = reinterpret_cast<unsigned char*>(
        instructions + device_plan_capacity(problem).instructions * kInstructionWords);
    mk::check_cuda(
        cudaLaunchKernelEx(&config,
                           in_smem ? device_plan_kernel<true> : device_plan_kernel<false>,
                           problem,
                           instructions,
                           in_smem ? nullptr : behind,
                           header,
                           mk::FailureRecords::device(device)),
        "planner launch");
}

}  // namespace mla
