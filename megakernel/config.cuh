// What a megakernel is made of, in numbers. A program picks a config; the
// framework checks it against a Hopper CTA's budget.
#pragma once

#include <cstdint>

namespace mk {

inline constexpr int kWarpThreads = 32;
inline constexpr int kInstructionWords = 32;  // 128 bytes: one word per lane
inline constexpr int kWordOpcode = 0;
inline constexpr int kWordUid = 1;
inline constexpr int kOpcodeEndOfQueue = -1;

inline constexpr int kHopperSmemBytes = 227 * 1024;  // most that one CTA may ask for
inline constexpr int kHopperRegisters = 64 * 1024;

// Named barriers that the framework uses for itself; opcodes have the others.
inline constexpr int kNoteBarrier = 13;  // the loader has left a note for the launcher
inline constexpr int kNoteThreads = 2 * kWarpThreads;
inline constexpr int kBegunBarrier = 14;  // of all roles but the loader
// The first instruction's words are there, and what waits are made of: storer, controller, loader.
inline constexpr int kFirstWordsBarrier = 15;
inline constexpr int kFirstWordsThreads = 3 * kWarpThreads;

// CTAs of the largest cluster that every Hopper GPU can launch.
inline constexpr int kMaxClusterCtas = 8;

// Warps of a CTA, in this order: consumers first, because warpgroup instructions want warps aligned
// to four; then one control warpgroup, a warp per role.
enum class Role : int { kConsumer = 0, kController, kLoader, kStorer, kLauncher };
inline constexpr int kNumRoles = 5;

struct DefaultConfig {
    static constexpr int kNumConsumerWarps = 8;
    static constexpr int kNumControlWarps = 4;

    // Registers per thread after setmaxnreg. At launch every thread has the same share.
    static constexpr int kLaunchRegisters = 168;
    static constexpr int kConsumerRegisters = 232;
    static constexpr int kControlRegisters = 40;

    static constexpr int kNumSmemPages = 6;
    static constexpr int kSmemPageBytes = 36 * 1024;
    // The consumers' own, within one instruction.
    static constexpr int kScratchBytes = 9 * 1024 + 512;
    static constexpr int kInstructionRing = 4;  // instructions in flight in one CTA
    static constexpr int kSemaphoresPerInstruction = 16;
    static constexpr int kNumClusterBarriers = 4;  // see State::cluster_barrier

    // A page is free when this many arrivals have come: one per warp of the warpgroup that used
    // it last, or all of them from a single warp.
    static constexpr int kPageReleaseArrivals = 4;

    static constexpr bool kTimings = false;
};

template <class Base>
struct WithTimings : Base {
    static constexpr bool kTimings = true;
};

template <class Config>
constexpr int kNumThreads = (Config::kNumConsumerWarps + Config::kNumControlWarps) * kWarpThreads;

template <class Config>
constexpr bool check_register_budget() {
    constexpr int consumers = Config::kNumConsumerWarps * kWarpThreads;
    constexpr int control = Config::kNumControlWarps * kWarpThreads;
    static_assert(kNumThreads<Config> * Config::kLaunchRegisters <= kHopperRegisters,
                  "registers at launch exceed the register file");
    static_assert(consumers * Config::kConsumerRegisters + control * Config::kControlRegisters <=
                      kNumThreads<Config> * Config::kLaunchRegisters,
                  "setmaxnreg can only hand out what the CTA was launched with");
    return true;
}

}  // namespace mk
