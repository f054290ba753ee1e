// The device planner's kernel: one CTA as the team.
#pragma once

#include <cuda_runtime.h>

#include "megakernel/args.h"
#include "megakernel/launch.h"
#include "scheduler/device_plan.h"

namespace mla {

class CtaTeam {
  public:
    static constexpr int kThreads = 1024;
    static constexpr int kLanes = 32;

    __device__ int rank() const { return threadIdx.x; }
    __device__ int size() const { return kThreads; }
    __device__ int lane() const { return threadIdx.x % kLanes; }
    __device__ int lanes() const { return kLanes; }
    __device__ int group() const { return threadIdx.x / kLanes; }
    __device__ int num_groups() const { return kThreads / kLanes; }
    __device__ void sync() const { __syncthreads(); }

    __device__ int64_t sum(int64_t x) const {
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
        return x;
    }
    __device__ int max(int x) const { return __reduce_max_sync(~0u, x); }

    __device__ int atomic_add(int32_t* to, int32_t x) const { return atomicAdd(to, x); }
    __device__ void atomic_add(int64_t* to, int64_t x) const {
        atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(x));
    }
    __device__ void atomic_max(int32_t* to, int32_t x) const { atomicMax(to, x); }
    __device__ void atomic_max(uint32_t* to, uint32_t x) const { atomicMax(to, x); }
    __device__ void atomic_min(int32_t* to, int32_t x) const { atomicMin(to, x); }

    // values[0, n) become the sums of what comes before them, values[n] that of all.
    __device__ void prefix_sums(int64_t* values, int n) const {
        __shared__ int64_t group_sums[kThreads / kLanes];
        const int per_thread = (n + kThreads - 1) / kThreads;
        const int begin = min(n, rank() * per_thread), end = min(n, begin + per_thread);
        int64_t own = 0;
        for (int i = begin; i < end; ++i) own += values[i];
        int64_t through = own;  // this lane's and those before it
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
            const int64_t other = __shfl_up_sync(~0u, through, step);
            if (lane() >= step) through += other;
        }
        if (lane() == kLanes - 1) group_sums[group()] = through;
        __syncthreads();
        int64_t before = lane() < group() ? group_sums[lane()] : 0;
        before = sum(before) + through - own;
        for (int i = begin; i < end; ++i) {
            const int64_t value = values[i];
            values[i] = before;
            before += value;
        }
        if (rank() == kThreads - 1) values[n] = before;
        __syncthreads();
    }
};

__global__ void __launch_bounds__(CtaTeam::kThreads, 1)
    device_plan_kernel(const __grid_constant__ DevicePlanProblem problem,
                       int32_t* words,
                       unsigned char* state_memory,
                       int32_t* header,
                       mk::FailureRecord* failure) {
    extern __shared__ __align__(16) unsigned char smem[];
    mk::ptx::allow_next_kernel();
    mk::ptx::wait_for_earlier_kernels();
    DevicePlanState state;
    device_plan_layout(problem,
                       device_plan_capacity(problem),
                       state_memory != nullptr ? state_memory : smem,
                       &state);
    const CtaTeam team;
    DevicePlanner<CtaTeam>(team, problem, state).run(words, header);
    if (threadIdx.x != 0 || state.choice->num_bad == 0) return;
    if (atomicCAS_system(&failure->valid, 0, 2) != 0) return;
    failure->wait_kind = static_cast<int32_t>(mk::WaitKind::kBadLength);
    failure->index = state.choice->bad_request;
    failure->expected = problem.max_seq_len;
    failure->seen = state.choice->bad_length;
    __threadfence_system();
    *static_cast<volatile int32_t*>(&failure->valid) = 1;
}

// Enqueues the planning of one step. `instructions` holds `capacity` of them.
inline void launch_device_plan(const DevicePlanProblem& problem,
                               int32_t* instructions,
                               int64_t capacity,
                               int32_t* header,
                               int device,
                               cudaStream_t stream) {
    const mk::DeviceGuard guard(device);
    const DevicePlanCapacity needed = device_plan_capacity(problem);
    const auto bytes = static_cast<int64_t>(device_plan_layout(problem, needed, nullptr, nullptr));
    const bool in_smem = bytes <= kDevicePlanSmemBytes;
    if (capacity < device_plan_rows(problem)) {
        throw std::runtime_error("plan: " + std::to_string(capacity) +
                                 " instructions do not hold any plan of these sizes, which take " +
                                 std::to_string(device_plan_rows(problem)));
    }
    static std::once_flag prepared;
    std::call_once(prepared, [] {
        mk::check_cuda(cudaFuncSetAttribute(device_plan_kernel,
                                            cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            kDevicePlanSmemBytes),
                       "shared memory of the planner");
    });
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1);
    config.blockDim = dim3(CtaTeam::kThreads);
    config.dynamicSmemBytes = in_smem ? bytes : 0;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = 1;
    auto* behind =
        reinterpret_cast<unsigned char*>(instructions + needed.instructions * kInstructionWords);
    mk::check_cuda(cudaLaunchKernelEx(&config,
                                      device_plan_kernel,
                                      problem,
                                      instructions,
                                      in_smem ? nullptr : behind,
                                      header,
                                      mk::FailureRecords::device(device)),
                   "planner launch");
}

}  // namespace mla
