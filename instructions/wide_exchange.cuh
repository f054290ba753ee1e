// What the scorers and the consumers of a wide partial hand each other.
//
// A wide partial is computed by three warpgroups. The scorers (one warpgroup, the feeders of the
// megakernel) turn tile after tile into P: scores, softmax. The consumers (two) accumulate P V, the
// left one latent columns 0-255, the right one columns 256-511. So the tensor cores multiply one
// tile by its values while they score the next one, and nobody but the scorers knows what a maximum
// is: consumers are told what to multiply their output with.
#pragma once

#include "instructions/partial_work.cuh"
#include "instructions/softmax.cuh"
#include "megakernel/state.cuh"

namespace mla {

template <class Config>
struct WideExchange {
    PTile<typename Config::Element> p;
    float scale[kMaxRows];    // of the output so far, before this tile's P V is added
    float inverse[kMaxRows];  // of the output in the end

    // In the consumers' scratch, which is theirs once they have begun with the instruction.
    __device__ static WideExchange& of(const mk::State<Config>& state) {
        static_assert(sizeof(WideExchange) <= Config::kScratchBytes);
        return *reinterpret_cast<WideExchange*>(state.scratch());
    }
};

inline constexpr int kWideThreads = 3 * kWarpgroupThreads;

}  // namespace mla
