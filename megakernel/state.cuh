// What a role sees of the instruction that it is working on: its words, its
// pages, its semaphores, and the ways to wait. The only handle that opcodes use.
#pragma once

#include "control_block.cuh"
#include "ptx.cuh"
#include "watchdog.cuh"

namespace mk {

template <class Config_>
class State {
  public:
    using Config = Config_;

    __device__ State(const MegakernelArgs& args, Role role) : args_(args), watchdog_(args, role) {}

    // ---- the instruction ------------------------------------------------------

    __device__ const int32_t* words() const { return control().words[slot()]; }
    __device__ int32_t word(int index) const { return words()[index]; }
    __device__ int32_t opcode() const { return word(kWordOpcode); }
    __device__ int32_t uid() const { return word(kWordUid); }

    // Until the instruction's semaphores stand. Of opcodes only a loader with a member
    // kStartsFromWords calls this, in the CTA's first instruction, before it waits for anything or
    // tells anybody. False: the CTA has failed, and the instruction may never come.
    __device__ bool wait_decoded() const {
        const uint32_t parity = (index_ / Config::kInstructionRing) & 1;
        return wait_local<false>(ptx::smem_address(&control().decoded[slot()]), parity);
    }

    // ---- pages ------------------------------------------------------------------

    // Pages are numbered in the order in which the instruction asks for them.
    __device__ unsigned char* page(int logical) const {
        return smem_base() + physical_page(logical) * Config::kSmemPageBytes;
    }

    // Waits until the instruction before has let go of a page. An mbarrier tells only whether a
    // phase of this parity is over, so whoever waits must see every phase: the loader waits for
    // every page of every instruction, in queue order, and nobody else does. A role that needs to
    // know is told through a semaphore.
    __device__ bool wait_page(int logical) const {
        return wait_local(page_free(logical), pages_phase());
    }
    // Parity of the phase in which the instruction before lets go of its pages.
    __device__ uint32_t pages_phase() const { return (index_ + 1) & 1; }

    // Hands a page to the next instruction. Every page of every instruction must be released by
    // kPageReleaseArrivals arrivals; call from one lane.
    __device__ void release_page(int logical, int arrivals) const {
        ptx::mbar_arrive(page_free(logical), arrivals);
    }
    // The mbarrier on which to arrive for that.
    __device__ uint32_t page_free(int logical) const {
        return ptx::smem_address(&control().page_free[physical_page(logical)]);
    }

    // Releases the pages [first, kNumSmemPages) that this instruction has no use for, as they
    // come; for the loader's whole warp.
    __device__ void pass_pages_from(int first, int lane) const {
        const int logical = first + lane;
        if (logical < Config::kNumSmemPages) {
            wait_page(logical);
            release_page(logical, Config::kPageReleaseArrivals);
        }
        __syncwarp();
    }

    // Scratch of the consumers: theirs from their first to their last line in an instruction.
    __device__ unsigned char* scratch() const {
        return smem_base() + SmemLayout<Config>::kScratchOffset;
    }

    // ---- semaphores ---------------------------------------------------------------

    // mbarrier in phase 0 when the instruction starts, with the arrival count that the opcode's
    // Controller names.
    __device__ uint32_t semaphore(int index) const {
        return ptx::smem_address(&control().semaphores[slot()][index]);
    }

    __device__ void arrive(int index, int arrivals = 1) const {
        ptx::mbar_arrive(semaphore(index), arrivals);
    }

    // False: the launch has failed, and what was waited for may never be true.
    __device__ bool wait(int index, uint32_t phase) const {
        return wait_local(semaphore(index), phase & 1);
    }

    // Whether a wait would end at once.
    __device__ bool is_over(int index, uint32_t phase) const {
        return ptx::mbar_test_wait(semaphore(index), phase & 1);
    }

    // ---- from the loader to the launcher --------------------------------------------

    // In the CTA's first instruction the loader's warp may leave a note, which the launcher's reads
    // when it is there. If one does so, so has the other.
    template <class Note>
    __device__ void leave_note(const Note& note) const {
        static_assert(sizeof(Note) <= sizeof(control().loaders_note));
        if (ptx::thread_in_cta() % kWarpThreads == 0) {
            *reinterpret_cast<Note*>(control().loaders_note) = note;
        }
        __syncwarp();
        ptx::named_barrier_arrive(kNoteBarrier, kNoteThreads);
    }
    template <class Note>
    __device__ Note read_note() const {
        ptx::named_barrier_sync(kNoteBarrier, kNoteThreads);
        return *reinterpret_cast<const Note*>(control().loaders_note);
    }

    // ---- other CTAs of the cluster ------------------------------------------------

    // mbarrier that stands there from the launch on, for CTAs of one cluster. Its one phase ends
    // with kMaxClusterCtas arrivals: of a CTA for each that takes part, the others' by itself.
    __device__ uint32_t cluster_barrier(int index) const {
        return ptx::smem_address(&control().cluster_barriers[index]);
    }
    // Then what others sent here can be read.
    __device__ bool wait_cluster(int index) const { return wait_local(cluster_barrier(index), 0); }

    // ---- other CTAs -----------------------------------------------------------------

    // Waits until the flag carries this launch's epoch, then sees what was written before it.
    __device__ bool wait_done_flag(const int32_t* flag, int index) const {
        const int32_t epoch = launch_epoch<Config>();
        for (uint32_t start = 0;;) {
            const int32_t seen = ptx::load_acquire_gpu(flag);
            if (seen == epoch) return true;
            if (start == 0) start = coarse_time();
            if (watchdog_.flag_expired(start, slot(), index, epoch, seen)) [[unlikely]]
                return false;
        }
    }

    // For a warp whose lanes wait for what other CTAs do, or for nothing: calls look() until it has
    // said for all lanes that they wait no more. `index` says for what, `seen` what is there
    // instead.
    template <class Look>
    __device__ bool keep_looking(int index, const int32_t& seen, Look look) const {
        constexpr int kPauseNs = 100;  // hundreds of warps may look at one line
        const int32_t epoch = launch_epoch<Config>();
        for (uint32_t start = 0;;) {
            const bool waits = look();
            if (__all_sync(~0u, !waits)) return true;
            __nanosleep(kPauseNs);
            if (start == 0) start = coarse_time();
            const bool expired = waits && watchdog_.flag_expired(start, slot(), index, epoch, seen);
            if (__any_sync(~0u, expired)) [[unlikely]]
                return false;
        }
    }

    // The same for flags of the lanes' own: each calls use() as soon as its flag is up, or at once
    // where that is known.
    template <class Use>
    __device__ bool watch_done_flags(
        const int32_t* flags, int own, bool waits, bool known, Use use) const {
        const int32_t epoch = launch_epoch<Config>();
        int32_t seen = epoch;
        return keep_looking(own, seen, [&] {
            if (waits && !known) seen = ptx::load_acquire_gpu(&flags[own]);
            if (waits && seen == epoch) {
                waits = false;
                use();
            }
            return waits;
        });
    }

    // Raises a flag for all that this thread wrote, and all that it has seen written.
    __device__ void raise_done_flag(int32_t* flag) const {
        ptx::store_release_gpu(flag, launch_epoch<Config>());
    }

    __device__ bool failed() const { return watchdog_.failed(); }

    // ---- timing -----------------------------------------------------------------------

    // Free when the config has no timings. Call from one lane.
    __device__ void record(TimingWord which) const {
        if constexpr (Config::kTimings) {
            args_.timings[control().ticket[slot()] * kTimingWords + static_cast<int>(which)] =
                static_cast<int32_t>(ptx::global_time_ns());
        }
    }

    // ---- for the role loops -------------------------------------------------------------

    __device__ int slot() const { return index_ % Config::kInstructionRing; }
    __device__ int index() const { return index_; }
    __device__ void advance() { ++index_; }
    __device__ static ControlBlock<Config>& control() { return control_block<Config>(); }
    __device__ const Watchdog<Config>& watchdog() const { return watchdog_; }

    // A role's wait for another one of its CTA. Who waits for an instruction hangs in none, and
    // another warp of the role may: that is not noted.
    template <bool kNoted = true>
    __device__ __forceinline__ bool wait_local(uint32_t mbar, uint32_t parity) const {
        while (!ptx::mbar_try_wait(mbar, parity)) {
            if (kNoted) watchdog_.note(slot(), mbar, parity);
            if (watchdog_.failed()) [[unlikely]]
                return false;
        }
        return true;
    }
    // The controller's, which watches the clock for all of them. False: in vain. Where nobody knows
    // yet, `given_up` says for what; to blame somebody is left to the end, because that is code,
    // and waits are in several places.
    __device__ bool wait_watching(uint32_t mbar,
                                  uint32_t parity,
                                  WaitKind kind,
                                  int slot,
                                  typename Watchdog<Config>::GivenUp& given_up) const {
        uint32_t start = 0;
        while (!ptx::mbar_try_wait(mbar, parity)) {
            if (watchdog_.failed()) [[unlikely]]
                return false;
            if (start == 0) start = coarse_time();
            const auto cause = watchdog_.overdue(start, watchdog_.controllers_limit_us());
            if (cause == Watchdog<Config>::kNone) [[likely]]
                continue;
            const auto expected = static_cast<int>(parity);
            given_up = {cause, kind, slot, expected, expected ^ 1};
            return false;
        }
        return true;
    }

  private:
    __device__ int physical_page(int logical) const {
        return control().physical_page[slot()][logical];
    }

    const MegakernelArgs& args_;
    const Watchdog<Config> watchdog_;
    int index_ = 0;  // of the instruction in this CTA's own sequence
};

}  // namespace mk
