// The controller warp: draws tickets from the global queue, decodes each
// instruction into a ring slot one ahead of the one that runs, grants it the
// pages in the order in which its predecessor gives them up, and builds and
// retires its semaphores.
#pragma once

#include "opcode_list.cuh"
#include "state.cuh"

namespace mk {

// The ticket counter starts at 0 and the CTA's index is its first ticket, so a draw is offset by
// the grid. The CTA that leaves last puts the state back for the next launch and moves the epoch
// past this one's: no reset pass, no argument that a captured graph would freeze.
__device__ inline int draw_ticket(QueueState* queue) {
    return static_cast<int>(gridDim.x) + atomicAdd(&queue->next_ticket, 1);
}

__device__ inline void leave_queue(QueueState* queue, int32_t epoch) {
    __threadfence();
    if (atomicAdd(&queue->ctas_left, 1) + 1 != static_cast<int>(gridDim.x)) return;
    queue->next_ticket = 0;
    queue->ctas_left = 0;
    queue->epoch = epoch;
}

// This lane's word of an instruction; past the end of the queue, the opcode that ends it.
__device__ inline int32_t fetch_word(const MegakernelArgs& args, int ticket) {
    if (ticket >= args.num_instructions) return kOpcodeEndOfQueue;
    return __ldg(&args.instructions[ticket * kInstructionWords + threadIdx.x % kWarpThreads]);
}

template <class Config, class Ops>
class Controller {
  public:
    // Decodes the CTA's first instruction, before its other warps run. run() tells them.
    template <class Globals>
    __device__ static void begin(const Globals& globals) {
        if (!globals.megakernel.instructions_are_constant) ptx::wait_for_earlier_kernels();
        State<Config> state(globals.megakernel, Role::kController);
        const int ticket = static_cast<int>(blockIdx.x);
        decode(globals, state, ticket, fetch_word(globals.megakernel, ticket));
    }

    template <class Globals>
    __device__ static void run(const Globals& globals, State<Config>& state) {
        const MegakernelArgs& args = globals.megakernel;
        const bool is_first_lane = threadIdx.x % kWarpThreads == 0;
        tell_roles(state);
        ptx::wait_for_earlier_kernels();
        if (is_first_lane) begin_epoch(args);
        GivenUp given_up;
        while (state.opcode() != kOpcodeEndOfQueue) {
            if (!is_known(state.opcode())) {  // the other roles end there too
                given_up = {
                    Watchdog<Config>::kHere, WaitKind::kBadOpcode, state.slot(), 0, state.opcode()};
                break;
            }
            if (!wait_prefetch_gate(state, given_up)) break;
            int ticket = 0;
            if (is_first_lane) ticket = draw_ticket(args.queue);
            ticket = __shfl_sync(~0u, ticket, 0);
            const int32_t word = fetch_word(args, ticket);
            state.advance();
            if (!retire_slot(state, given_up)) break;
            decode(globals, state, ticket, word);
            tell_roles(state);
        }
        if (is_first_lane) leave_queue(args.queue, launch_epoch<Config>());
        if (given_up.cause == Watchdog<Config>::kNone) watch_the_rest(state, given_up);
        if (given_up.cause != Watchdog<Config>::kNone) state.watchdog().blame(given_up);
    }

  private:
    using GivenUp = typename Watchdog<Config>::GivenUp;

    __device__ static bool is_known(int32_t opcode) {
        return Ops::visit(opcode, []<class Op>(std::type_identity<Op>) {});
    }

    // Every launch has an epoch of its own, later than the last one's by 1 + tic.
    __device__ static void begin_epoch(const MegakernelArgs& args) {
        ControlBlock<Config>& control = control_block<Config>();
        control.epoch = ptx::load_relaxed_gpu(&args.queue->epoch) + 1 + args.tic;
        ptx::mbar_arrive(ptx::smem_address(&control.epoch_known));
    }

    // An instruction, counted as this CTA runs them, is done.
    __device__ static bool wait_retired(const State<Config>& state, int index, GivenUp& given_up) {
        const int slot = index % Config::kInstructionRing;
        return state.wait_watching(ptx::smem_address(&state.control().retired[slot]),
                                   (index / Config::kInstructionRing) & 1,
                                   WaitKind::kRetired,
                                   slot,
                                   given_up);
    }

    // The clock is watched until the last instruction is done.
    __device__ static void watch_the_rest(const State<Config>& state, GivenUp& given_up) {
        const int end = state.index();
        for (int i = max(0, end - Config::kInstructionRing + 1); i < end; ++i) {
            if (!wait_retired(state, i, given_up)) return;
        }
    }

    // Waits until the instruction that had this slot is done, and takes its semaphores down. False:
    // the CTA has failed, and the slot stays as it is. A role may still be at work in it, and what
    // the failure was is read from it.
    __device__ static bool retire_slot(State<Config>& state, GivenUp& given_up) {
        const int lane = threadIdx.x % kWarpThreads;
        const bool is_used = state.index() >= Config::kInstructionRing;
        const bool ok =
            !is_used || wait_retired(state, state.index() - Config::kInstructionRing, given_up);
        if (!__all_sync(~0u, ok && !state.failed())) return false;
        if (is_used && lane < state.control().num_semaphores[state.slot()]) {
            ptx::mbar_invalidate(state.semaphore(lane));
        }
        __syncwarp();
        return true;
    }

    __device__ static bool wait_prefetch_gate(State<Config>& state, GivenUp& given_up) {
        const int slot = state.slot();
        const bool ok = state.wait_watching(ptx::smem_address(&state.control().loads_issued[slot]),
                                            (state.index() / Config::kInstructionRing) & 1,
                                            WaitKind::kPrefetchGate,
                                            slot,
                                            given_up);
        return __all_sync(~0u, ok);
    }

    template <class Globals>
    __device__ static void decode(const Globals& globals,
                                  State<Config>& state,
                                  int ticket,
                                  int32_t word) {
        const int lane = threadIdx.x % kWarpThreads;
        const int32_t opcode = __shfl_sync(~0u, word, kWordOpcode);
        ControlBlock<Config>& control = state.control();
        const int slot = state.slot();
        grant_pages(globals, state, lane);
        control.words[slot][lane] = word;
        if (lane == 0) control.ticket[slot] = ticket;
        __syncwarp();
        if (state.index() == 0) ptx::named_barrier_arrive(kFirstWordsBarrier, kFirstWordsThreads);
        Ops::visit(opcode, [&]<class Op>(std::type_identity<Op>) {
            static_assert(Op::kNumSemaphores <= Config::kSemaphoresPerInstruction);
            // By one lane: the hardware takes mbarriers to build from one lane after the other.
            if (!ptx::elect_lane()) return;
#pragma unroll
            for (int i = 0; i < Op::kNumSemaphores; ++i) {
                ptx::mbar_init(state.semaphore(i), Op::Controller::arrival_count(globals, i));
            }
            control.num_semaphores[slot] = Op::kNumSemaphores;
        });
        if (opcode != kOpcodeEndOfQueue && lane == 0) {
            state.record(TimingWord::kFetched);
            if constexpr (Config::kTimings) {
                globals.megakernel.timings[ticket * kTimingWords] =
                    static_cast<int32_t>(ptx::sm_id()) + 1;
            }
        }
        ptx::fence_mbar_init();
        __syncwarp();
    }

    __device__ static void tell_roles(const State<Config>& state) {
        if (threadIdx.x % kWarpThreads != 0) return;
        ptx::mbar_arrive(ptx::smem_address(&state.control().decoded[state.slot()]));
    }

    // The page that the predecessor gives up k-th is the page that this one asks for k-th.
    template <class Globals>
    __device__ static void grant_pages(const Globals& globals, State<Config>& state, int lane) {
        ControlBlock<Config>& control = state.control();
        if (lane >= Config::kNumSmemPages) return;
        int physical = lane;
        if (state.index() > 0) {
            const int before = (state.index() - 1) % Config::kInstructionRing;
            const int32_t* words = control.words[before];
            Ops::visit(words[kWordOpcode], [&]<class Op>(std::type_identity<Op>) {
                const int logical = Op::Controller::released_page(globals, words, lane);
                physical = control.physical_page[before][logical];
            });
        }
        control.physical_page[state.slot()][lane] = static_cast<uint8_t>(physical);
    }
};

}  // namespace mk
