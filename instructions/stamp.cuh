// Partial results that tell by themselves that they are there.
//
// Where results are stamped, MlaConfig says where, a partial result is written 16 bytes at a time,
// each in one access: four columns of a row, as floats without their last ten bits. In place of
// those are eight bits of the launch's stamp in each of the four floats, and two bits of the row's
// LSE, of which the next three 16 bytes have the rest. So no fence has to come after a result, and
// no flag: who reads it asks again until it bears the stamp.
//
// What lay there before never does. It is zero, or it bears the stamp of an earlier launch, or a
// kernel without stamps has written it, and has put a 0 where each stamp has a 1: see unstamped().
#pragma once

#include "instructions/layout.h"
#include "megakernel/ptx.cuh"

namespace mla {

inline constexpr int kVectorColumns = 4;  // 16 bytes of floats

// So many columns of a row, as they lie in scratch.
using StampedColumns = uint4;

class Stamp {
  public:
    static constexpr int kLseParts = 4;  // an LSE lies across so many 16 bytes

    // For the columns from a multiple of kVectorColumns on.
    __device__ Stamp(int32_t epoch, int vector)
        : bits_(static_cast<uint32_t>(epoch) << 1 | 1), lse_shift_(lse_shift(vector)) {}

    __device__ StampedColumns put_on(const float4& columns, float lse_log2) const {
        const uint32_t lse = __float_as_uint(lse_log2) >> lse_shift_;
        return {join<0>(columns.x, lse),
                join<1>(columns.y, lse),
                join<2>(columns.z, lse),
                join<3>(columns.w, lse)};
    }
    __device__ bool is_on(const StampedColumns& columns) const {
        return bytes<0>(columns) == bits_;
    }

    // The epoch, but for its highest bit, of the launch that has put a stamp on.
    __device__ static int epoch_of(const StampedColumns& columns) { return bytes<0>(columns) >> 1; }
    // Of the row's LSE, the bits that are here.
    __device__ static uint32_t lse_bits(const StampedColumns& columns, int vector) {
        return (bytes<1>(columns) & kLseBits) << lse_shift(vector);
    }

    __device__ static float value(uint32_t column) { return __uint_as_float(column & ~kTaken); }
    __device__ static float4 values(const StampedColumns& columns) {
        return {value(columns.x), value(columns.y), value(columns.z), value(columns.w)};
    }
    __device__ static float4 values(const float4& columns) {
        return {value(__float_as_uint(columns.x)),
                value(__float_as_uint(columns.y)),
                value(__float_as_uint(columns.z)),
                value(__float_as_uint(columns.w))};
    }

  private:
    static constexpr uint32_t kTaken = 0x3ff;         // of a float
    static constexpr uint32_t kLseBits = 0x03030303;  // of an LSE shifted, those that go along

    const uint32_t bits_;
    const int lse_shift_;

    __device__ static int lse_shift(int vector) { return vector % kLseParts * 2; }

    // The first byte of each of the four columns, or the second.
    template <int kByte>
    __device__ static uint32_t bytes(const StampedColumns& c) {
        constexpr uint32_t kOfBoth = kByte | (4 + kByte) << 4;
        return __byte_perm(
            __byte_perm(c.x, c.y, kOfBoth), __byte_perm(c.z, c.w, kOfBoth << 8), 0x7610);
    }
    template <int kColumn>
    __device__ uint32_t join(float column, uint32_t lse) const {
        const uint32_t low = __byte_perm(bits_, lse, kColumn | (4 + kColumn) << 4);
        return (__float_as_uint(column) & ~kTaken) | (low & kTaken);
    }
};

// What kernels without stamps write: never taken for stamped.
__device__ __forceinline__ float4 unstamped(const float4& columns) {
    return {__uint_as_float(__float_as_uint(columns.x) & ~1u), columns.y, columns.z, columns.w};
}

}  // namespace mla
