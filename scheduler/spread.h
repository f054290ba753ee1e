// Which SMs work where some have nothing to do.
//
// The SMs of either half of the GPU read at most 2.6 of the memory's 4.6 TB/s (H200), so those at
// work should be in both alike. CTAs of a launch take SMs in their order, but in a row of launches
// those that the one before does not use come first: with work for the first CTAs such launches use
// every SM of one half and few of the other, in turns. So no-ops come first, as many as there are
// workers without a partial, and the SMs that the first launch leaves out, some in each half, stay
// those. 93 partials of 24 tiles take 44.1 us instead of 50.7.
#pragma once

#include "instructions/host_device.h"

namespace mla {

// No-ops before a queue of whole sequences that share no keys. (With fewer, or with less work than
// idle SMs, it counts for more that the next launch's first CTAs come up early: half a
// microsecond.)
MLA_HOST_DEVICE int noops_to_spread(int num_workers, int num_partials) {
    constexpr int kLeast = 12;
    const int idle = num_workers - num_partials;
    return idle >= kLeast && idle < num_partials ? idle : 0;
}

// The same where two mates share a partial, if the longest has so many: the fewer, the more that
// half microsecond counts. (Larger clusters leave SMs out anyway.)
inline constexpr uint32_t kLeastTilesOfMates = 8;

// What spread workers' tiles take, of the constants of the cost model: less of the contention, and
// somewhat more than the memory's rate explains. (H200, 70 to 120 partials of 24 to 64 tiles in
// groups of 16, 32 and 64 rows: within 6%.)
inline constexpr double kSpreadContention = 0.5;
inline constexpr double kSpreadMemory = 1.08;

}  // namespace mla
