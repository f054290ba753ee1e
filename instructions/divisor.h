// Division by a number that the host knows, as a product and a shift: the hardware
// divides by thirty instructions, and each of them costs time to fetch.
#pragma once

#include <cstdint>

#include "instructions/host_device.h"

namespace mla {

// Quotients of 0 <= n < 2^31 by d >= 1. With 2^shift >= d and the multiplier 2^(31 + shift) / d,
// rounded up, the product exceeds 2^(31 + shift) n / d by less than 2^(31 + shift) / d: the floor
// is right. (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.)
struct Divisor {
    uint32_t multiplier;
    int32_t shift;

    MLA_HOST_DEVICE static constexpr Divisor of(int d) {
        int32_t shift = 0;
        while (int64_t{1} << shift < d) ++shift;
        return {static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / d), shift};
    }
    MLA_HOST_DEVICE constexpr int quotient(int n) const {
        const uint64_t product = static_cast<uint64_t>(2 * static_cast<uint32_t>(n)) * multiplier;
        return static_cast<int>(static_cast<uint32_t>(product >> 32) >> shift);
    }
};

namespace detail {
// At both ends, and on both sides of multiples.
constexpr bool divides_exactly(int d) {
    constexpr int kMost = 0x7fffffff;
    const int last = kMost / d * d;
    for (const int n :
         {0, 1, d - 1, d, last / d / 2 * d - 1, last / d / 2 * d, last - 1, last, kMost}) {
        if (n >= 0 && Divisor::of(d).quotient(n) != n / d) return false;
    }
    return true;
}
static_assert(divides_exactly(1) && divides_exactly(2) && divides_exactly(3) &&
              divides_exactly(7) && divides_exactly(48) && divides_exactly(63) &&
              divides_exactly(64) && divides_exactly(80) && divides_exactly(126) &&
              divides_exactly(1000) && divides_exactly(1023) && divides_exactly(1048575) &&
              divides_exactly(1073741825) && divides_exactly(2147483647));
}  // namespace detail

}  // namespace mla
