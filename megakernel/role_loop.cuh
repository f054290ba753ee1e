// The loop that loaders, consumers, storers and launchers share: take the next
// decoded instruction, run this role's part of it, say that it is done.
#pragma once

#include "opcode_list.cuh"
#include "state.cuh"

namespace mk {

template <Role kRole, class Op>
struct RoleOf;
template <class Op>
struct RoleOf<Role::kLoader, Op> : Op::Loader {};
template <class Op>
struct RoleOf<Role::kConsumer, Op> : Op::Consumer {};
template <class Op>
struct RoleOf<Role::kStorer, Op> : Op::Storer {};
template <class Op>
struct RoleOf<Role::kLauncher, Op> : Op::Launcher {};

// Roles wait for the kernels before when they have their first instruction, but for those that say
// that they do so themselves, by a member kWaitsForEarlierKernels.
template <class Part>
constexpr bool waits_itself() {
    return requires { Part::kWaitsForEarlierKernels; };
}
// A loader may start as soon as the CTA's first instruction has words, if it says so by a member
// kStartsFromWords, and then calls State::wait_decoded.
template <class Part>
constexpr bool starts_from_words() {
    return requires { Part::kStartsFromWords; };
}

template <class Config>
constexpr int retire_arrivals() {  // one per warp but the controller's
    return Config::kNumConsumerWarps + Config::kNumControlWarps - 1;
}

template <Role kRole, class Config, class Ops, class Globals>
__device__ void run_role(const Globals& globals, State<Config>& state) {
    // (Not kept over an instruction: registers are what loaders and consumers are short of.)
    const auto is_first_lane = [] { return ptx::thread_in_cta() % kWarpThreads == 0; };
    for (;; state.advance()) {
        const int slot = state.slot();
        ControlBlock<Config>& control = state.control();
        const bool has_words_only = kRole == Role::kLoader && state.index() == 0;
        if (has_words_only) {
            ptx::named_barrier_sync(kFirstWordsBarrier, kFirstWordsThreads);
        } else if (!state.wait_decoded()) {
            break;  // nothing of a slot that never came may be read: the failed CTA stops here
        }
        // The end of the queue is no opcode, nor is what the controller refuses.
        const bool known = Ops::visit(state.opcode(), [&]<class Op>(std::type_identity<Op>) {
            using Part = RoleOf<kRole, Op>;
            if (has_words_only && !starts_from_words<Part>()) state.wait_decoded();
            if (!waits_itself<Part>() && state.index() == 0) ptx::wait_for_earlier_kernels();
            Part::run(globals, state);
            __syncwarp();
            if (kRole == Op::kPrefetchGate && is_first_lane()) {
                ptx::mbar_arrive(ptx::smem_address(&control.loads_issued[slot]));
            }
        });
        // What other CTAs of the cluster have is nothing to a loader, but an arrival has its wait.
        if (has_words_only && ptx::cluster_size() > 1) ptx::cluster_wait();
        if (!known) break;
        if (is_first_lane()) {
            state.watchdog().clear_note();
            ptx::mbar_arrive(ptx::smem_address(&control.retired[slot]));
        }
    }
}

}  // namespace mk
