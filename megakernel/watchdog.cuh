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

    // Of a role, in every turn of a spin: on which mbarrier. That is in many places: what it means
    // is left to blame().
    __device__ __forceinline__ void note(int slot, uint32_t mbar, uint32_t parity) const {
        control().wait_of_role[static_cast<int>(role_)] =
            static_cast<int32_t>(mbar + (slot << kNoteSlot | parity));
    }
    __device__ __forceinline__ void clear_note() const {
        control().wait_of_role[static_cast<int>(role_)] = 0;
    }

    enum Cause { kNone, kHere, kElsewhere };

    // Why a spin that began at `start` should end now, to be asked in every turn.
    __device__ __forceinline__ Cause overdue(uint32_t start, uint32_t limit_us) const {
        const uint32_t elapsed = coarse_time() - start;
        if (elapsed < kQuietUnits) [[likely]]
            return kNone;
        if (ptx::load_relaxed_gpu(&args_.queue->failed_epoch) == launch_epoch<Config>()) {
            return kElsewhere;
        }
        return elapsed < limit_us ? kNone : kHere;
    }

    // Of a wait for another CTA's flag, in every turn. True: give up.
    __device__ __forceinline__ bool flag_expired(
        uint32_t start, int slot, int index, int expected, int seen) const {
        if (failed()) [[unlikely]]
            return true;
        const Cause cause = overdue(start, args_.timeout_us);
        if (cause == kNone) [[likely]]
            return false;
        raise(role_, slot, WaitKind::kDoneFlag, index, expected, seen, cause);
        return true;
    }

    // What the controller gives up for. Its waits take twice as long as those for other CTAs, so
    // that the record names the cause and not its echo.
    struct GivenUp {
        Cause cause = kNone;
        WaitKind kind;
        int slot, expected, seen;
    };
    __device__ uint32_t controllers_limit_us() const { return 2 * args_.timeout_us; }

    // By the controller, which waits because a role does: the first one with a note, in the order
    // in which roles wait for each other. The notes are read before anything is raised, because who
    // sees a failure walks on and clears its own.
    __device__ void blame(const GivenUp& why) const {
        Role role = Role::kController;
        int32_t note = 0;
        for (const Role other : {Role::kStorer, Role::kConsumer, Role::kLauncher, Role::kLoader}) {
            const int32_t others = control().wait_of_role[static_cast<int>(other)];
            if (others == 0 || why.kind == WaitKind::kBadOpcode) continue;
            role = other;
            note = others;
        }
        GivenUp what = why;
        int index = why.slot;
        if (note != 0) {
            const int slot = note >> kNoteSlot & 0xf, expected = note & 1;
            const Awaited awaited = awaited_on(note - expected, slot);
            what = {why.cause, awaited.kind, slot, expected, expected ^ 1};
            index = awaited.index;
        }
        raise(role, what.slot, what.kind, index, what.expected, what.seen, what.cause);
    }

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

    static constexpr int kNoteSlot = 20;  // bits above an address within the CTA

    struct Awaited {
        WaitKind kind;
        int index;
    };
    // What an mbarrier stands for, by its place in the control block.
    __device__ static Awaited awaited_on(uint32_t mbar, int slot) {
        const auto place_in = [&](const uint64_t* first) {
            constexpr uint32_t kAddress = (1 << kNoteSlot) - 1;
            const uint32_t begin = ptx::smem_address(first) & kAddress;
            return static_cast<int>((mbar & kAddress) - begin) / static_cast<int>(sizeof(*first));
        };
        using Block = ControlBlock<Config>;
        static_assert(offsetof(Block, semaphores) < offsetof(Block, page_free) &&
                      offsetof(Block, page_free) < offsetof(Block, cluster_barriers));
        const Block& block = control();
        const int cluster_barrier = place_in(block.cluster_barriers);
        if (cluster_barrier >= 0) return {WaitKind::kCluster, cluster_barrier};
        const int physical_page = place_in(block.page_free);
        if (physical_page < 0) return {WaitKind::kSemaphore, place_in(block.semaphores[slot])};
        int page = 0;
        while (page + 1 < Config::kNumSmemPages &&
               block.physical_page[slot][page] != physical_page) {
            ++page;
        }
        return {WaitKind::kPage, page};
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
