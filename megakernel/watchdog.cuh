// Bounded waiting. No spin in a megakernel is for ever: one that outlasts its
// time marks the CTA, then the launch, as failed; from then on every wait
// returns at once. Control flow never depends on it, so all roles walk to the
// end of their instruction, barriers stay matched, and the CTA leaves cleanly.
//
// Two waits look at the clock: those for other CTAs, and the controller's, which last until all
// roles of its CTA are done. When roles wait for each other, they note what for and look whether
// the CTA has failed, no more: what a wait could do instead of ending lies in the way of every
// instruction fetched behind it.
#pragma once

#include "control_block.cuh"
#include "ptx.cuh"

namespace mk {

// Time in units of 1.024 us: 32 bits of it last for an hour.
__device__ __forceinline__ uint32_t coarse_time() {
    return static_cast<uint32_t>(ptx::global_time_ns() >> 10);
}

template <class Config>
class Watchdog {
  public:
    __device__ Watchdog(const MegakernelArgs& args, Role role) : args_(args), role_(role) {}

    __device__ __forceinline__ bool failed() const {
        return *static_cast<volatile int32_t*>(&control().failure.raised) != 0;
    }

    // Of a role, in every turn of a spin.
    __device__ __forceinline__ void note(int slot,
                                         WaitKind kind,
                                         int index,
                                         uint32_t parity) const {
        control().wait_of_role[static_cast<int>(role_)] =
            static_cast<int>(kind) << 24 | slot << 20 | static_cast<int>(parity) << 16 | index;
    }
    __device__ __forceinline__ void clear_note() const {
        control().wait_of_role[static_cast<int>(role_)] = 0;
    }

    // To be asked in every turn of a spin that began at `start`. True: give up. Waits that another
    // CTA ends get the time limit, the controller's twice that, so that the record names the cause
    // and not its echo.
    __device__ __forceinline__ bool expired(
        uint32_t start, int slot, WaitKind kind, int index, int expected, int seen) const {
        if (failed()) [[unlikely]]
            return true;
        const uint32_t elapsed = coarse_time() - start;
        if (elapsed < kQuietUnits) [[likely]]
            return false;
        const uint32_t limit =
            kind == WaitKind::kDoneFlag ? args_.timeout_us : 2 * args_.timeout_us;
        const bool other_failed =
            ptx::load_relaxed_gpu(&args_.queue->failed_epoch) == launch_epoch<Config>();
        if (!other_failed && elapsed < limit) return false;
        const Cause cause = other_failed ? kElsewhere : kHere;
        if (role_ != Role::kController || !blame_role(cause)) {
            raise(role_, slot, kind, index, expected, seen, cause);
        }
        return true;
    }

    enum Cause { kHere = 1, kElsewhere = 2 };

    // Does nothing where there has been a failure before.
    __device__ __forceinline__ void raise(
        Role role, int slot, WaitKind kind, int index, int expected, int seen, Cause cause) const {
        CtaFailure& failure = control().failure;
        if (atomicCAS(&failure.raised, 0, static_cast<int>(cause)) != 0) return;
        failure.role = static_cast<int32_t>(role);
        failure.slot = slot;
        failure.wait_kind = static_cast<int32_t>(kind);
        failure.index = index;
        failure.expected = expected;
        failure.seen = seen;
        ptx::store_relaxed_gpu(&args_.queue->failed_epoch, launch_epoch<Config>());
    }

  private:
    __device__ static ControlBlock<Config>& control() { return control_block<Config>(); }

    // The controller waits because a role does: the first one with a note, in the order in which
    // roles wait for each other. False: none has. The notes are read before anything is raised,
    // because who sees a failure walks on and clears its own.
    __device__ bool blame_role(Cause cause) const {
        for (const Role role : {Role::kLoader, Role::kLauncher, Role::kConsumer, Role::kStorer}) {
            const int32_t note = control().wait_of_role[static_cast<int>(role)];
            const int kind = note >> 24;
            if (kind == 0) continue;
            const int expected = note >> 16 & 1;
            raise(role,
                  note >> 20 & 0xf,
                  static_cast<WaitKind>(kind),
                  note & 0xffff,
                  expected,
                  expected ^ 1,
                  cause);
            return true;
        }
        return false;
    }

    // Below this much waiting nobody looks at global memory.
    static constexpr uint32_t kQuietUnits = 1000;

    const MegakernelArgs& args_;
    const Role role_;
};

// For the end of a failed CTA: copies that nobody waited for land before its shared memory becomes
// another CTA's.
__device__ inline void let_copies_land() {
    constexpr uint32_t kUnits = 100;  // a copy takes a few microseconds
    const uint32_t start = coarse_time();
    while (coarse_time() - start < kUnits) __nanosleep(1000);
}

// Called by one thread once all roles have left. The first CTA of the launch to come with a
// failure of its own writes the record.
template <class Config>
__device__ inline void publish_failure(const MegakernelArgs& args) {
    const ControlBlock<Config>& control = control_block<Config>();
    const CtaFailure& failure = control.failure;
    if (failure.raised != Watchdog<Config>::kHere) return;
    FailureRecord* record = args.failure;
    if (atomicCAS_system(&record->valid, 0, 2) != 0) return;
    record->sm = static_cast<int32_t>(ptx::sm_id());
    record->role = failure.role;
    record->instruction = control.ticket[failure.slot];
    record->uid = control.words[failure.slot][kWordUid];
    record->opcode = control.words[failure.slot][kWordOpcode];
    record->wait_kind = failure.wait_kind;
    record->index = failure.index;
    record->expected = failure.expected;
    record->seen = failure.seen;
    __threadfence_system();
    *static_cast<volatile int32_t*>(&record->valid) = 1;
}

}  // namespace mk
