// The kernel: one CTA per SM, a warp or more per role, each in its own loop over
// the instructions that the CTA draws from the global queue.
#pragma once

#include "controller.cuh"
#include "noop.cuh"
#include "role_loop.cuh"

namespace mk {

// By one warp.
template <class Config>
__device__ void init_control_block() {
    ControlBlock<Config>& control = control_block<Config>();
    if (threadIdx.x % kWarpThreads != 0) return;
    for (int slot = 0; slot < Config::kInstructionRing; ++slot) {
        ptx::mbar_init(ptx::smem_address(&control.decoded[slot]), 1);
        ptx::mbar_init(ptx::smem_address(&control.retired[slot]), retire_arrivals<Config>());
        ptx::mbar_init(ptx::smem_address(&control.loads_issued[slot]), 1);
    }
    for (int page = 0; page < Config::kNumSmemPages; ++page) {
        ptx::mbar_init(ptx::smem_address(&control.page_free[page]), Config::kPageReleaseArrivals);
    }
    ptx::mbar_init(ptx::smem_address(&control.epoch_known), 1);
    for (uint64_t& barrier : control.cluster_barriers) {
        ptx::mbar_init(ptx::smem_address(&barrier), kMaxClusterCtas);
    }
    for (int32_t& wait : control.wait_of_role) wait = 0;
    control.failure.raised = 0;
    ptx::fence_mbar_init();
}

template <class Config>
__device__ Role role_of_warp(int warp) {
    if (warp < Config::kNumConsumerWarps) return Role::kConsumer;
    return static_cast<Role>(warp - Config::kNumConsumerWarps + 1);
}

// Globals: what the opcodes read. It has a `MegakernelArgs megakernel`, and a `prefetch()` that one
// thread calls before anything else.
template <class Config, class Ops, class Globals>
__global__ void __launch_bounds__(kNumThreads<Config>, 1)
    megakernel(const __grid_constant__ Globals globals) {
    static_assert(check_register_budget<Config>());
    const MegakernelArgs& args = globals.megakernel;

    const int warp = threadIdx.x / kWarpThreads;
    const Role role = role_of_warp<Config>(warp);
    ptx::allow_next_kernel();
    if (role == Role::kLauncher && threadIdx.x % kWarpThreads == 0) globals.prefetch();
    if (role == Role::kStorer) {  // while the controller fetches
        init_control_block<Config>();
        __syncwarp();
        ptx::named_barrier_arrive(kFirstWordsBarrier, kFirstWordsThreads);
    }
    __syncwarp();
    ptx::cluster_arrive();
    // Earlier kernels may still run. What they may have written each role waits for when it has its
    // first instruction.
    if (role == Role::kController) Controller<Config, Ops>::begin(globals);
    // The loader, for which everybody waits, goes on as soon as there are words. (A barrier of all
    // threads, and a cluster of one is such a barrier, is to be reached in one place.)
    if (role != Role::kLoader) {
        if (ptx::cluster_size() > 1) ptx::cluster_wait();  // for mbarriers of the other CTAs
        ptx::named_barrier_sync(kBegunBarrier, kNumThreads<Config> - kWarpThreads);
    }

    if (role == Role::kConsumer) {
        ptx::move_registers<Config::kLaunchRegisters, Config::kConsumerRegisters>();
        State<Config> state(args, role);
        run_role<Role::kConsumer, Config, Ops>(globals, state);
    } else {
        ptx::move_registers<Config::kLaunchRegisters, Config::kControlRegisters>();
        State<Config> state(args, role);
        if (role == Role::kController) {
            Controller<Config, Ops>::run(globals, state);
        } else if (role == Role::kLoader) {
            run_role<Role::kLoader, Config, Ops>(globals, state);
        } else if (role == Role::kStorer) {
            run_role<Role::kStorer, Config, Ops>(globals, state);
        } else {
            run_role<Role::kLauncher, Config, Ops>(globals, state);
        }
    }

    // No CTA of a cluster leaves before all have sent what they send to it, even in a launch that
    // failed.
    __syncwarp();
    if (ptx::cluster_size() > 1) {
        ptx::cluster_arrive();
        ptx::cluster_wait();
    } else {
        __syncthreads();
    }
    if (control_block<Config>().failure.raised == 0) return;
    if (threadIdx.x == 0) publish_failure<Config>(args);
    let_copies_land();
}

}  // namespace mk
