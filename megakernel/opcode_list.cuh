// A megakernel's instruction set: a list of opcode structs. An opcode has
//
//     static constexpr int kOpcode;               // word 0
//     static constexpr int kNumSemaphores;        // mbarriers that it wants
//     static constexpr Role kPrefetchGate;        // the role after which the next one is fetched
//     struct Controller {
//         arrival_count(globals, semaphore)       // of each semaphore
//         released_page(globals, words, k)        // the k-th page, in order of release
//     };
//     struct Loader, Consumer, Storer, Launcher   // each: static run(globals, state)
#pragma once

#include <type_traits>

#include "config.cuh"

namespace mk {

// A role that has no part in an instruction.
struct Idle {
    template <class Globals, class State>
    __device__ static void run(const Globals&, State&) {}
};

template <class... Ops>
struct OpcodeList {
    // Calls f with the opcode's type; false when the list has no such opcode.
    template <class F>
    __device__ __forceinline__ static bool visit(int opcode, F&& f) {
        return ((opcode == Ops::kOpcode && (f(std::type_identity<Ops>{}), true)) || ...);
    }
};

}  // namespace mk
