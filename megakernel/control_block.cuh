// Shared memory of a CTA: the pages first, then what all roles agree through.
#pragma once

#include "args.h"
#include "config.cuh"
#include "ptx.cuh"

namespace mk {

// What the CTA knows of its own failure; the first wait to expire fills it.
struct CtaFailure {
    int32_t raised;
    int32_t role;
    int32_t slot;
    int32_t wait_kind;
    int32_t index;
    int32_t expected;
    int32_t seen;
};

template <class Config>
struct ControlBlock {
    // One slot per instruction in flight.
    int32_t words[Config::kInstructionRing][kInstructionWords];
    int32_t ticket[Config::kInstructionRing];
    int32_t num_semaphores[Config::kInstructionRing];
    uint8_t physical_page[Config::kInstructionRing][8];  // logical page -> physical page
    alignas(8) uint64_t semaphores[Config::kInstructionRing][Config::kSemaphoresPerInstruction];

    // mbarriers of the framework itself.
    uint64_t decoded[Config::kInstructionRing];       // the slot holds an instruction
    uint64_t retired[Config::kInstructionRing];       // every role is done with it
    uint64_t loads_issued[Config::kInstructionRing];  // the next one may be fetched
    uint64_t page_free[Config::kNumSmemPages];        // the instruction before has let go of it
    uint64_t epoch_known;
    // For what CTAs of a cluster do together in their first instruction.
    uint64_t cluster_barriers[Config::kNumClusterBarriers];

    int32_t loaders_note[4];          // see State::leave_note
    int32_t epoch;                    // see launch_epoch
    int32_t wait_of_role[kNumRoles];  // what it waits for, see Watchdog::note; 0: nothing
    CtaFailure failure;

    static_assert(Config::kNumSmemPages <= 8, "physical_page holds eight entries");
};

template <class Config>
struct SmemLayout {
    static constexpr int kScratchOffset = Config::kNumSmemPages * Config::kSmemPageBytes;
    static constexpr int kControlOffset = kScratchOffset + Config::kScratchBytes;
    static constexpr int kTotalBytes =
        kControlOffset + static_cast<int>(sizeof(ControlBlock<Config>));

    static_assert(Config::kSmemPageBytes % 1024 == 0,
                  "pages and scratch begin with tiles swizzled over 1 KiB");
    static_assert(Config::kScratchBytes % 128 == 0, "the control block follows the scratch");
    static_assert(kTotalBytes <= kHopperSmemBytes,
                  "smem pages + scratch + control block exceed the 227 KiB a Hopper CTA may use");
};

// The CTA's dynamic shared memory. Its address is a constant, so nothing keeps it in registers.
__device__ __forceinline__ unsigned char* smem_base() {
    extern __shared__ __align__(1024) unsigned char smem[];
    return smem;
}

template <class Config>
__device__ __forceinline__ ControlBlock<Config>& control_block() {
    return *reinterpret_cast<ControlBlock<Config>*>(smem_base() +
                                                    SmemLayout<Config>::kControlOffset);
}

// What a launch marks its flags with. The controller reads it behind the kernels before this one,
// while the first instruction runs.
template <class Config>
__device__ __forceinline__ int32_t launch_epoch() {
    ControlBlock<Config>& control = control_block<Config>();
    while (!ptx::mbar_try_wait(ptx::smem_address(&control.epoch_known), 0)) {
    }
    return control.epoch;
}

}  // namespace mk
