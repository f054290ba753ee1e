// The instruction that does nothing, and the shortest example of one: every page
// that an instruction has no use for must still be passed on.
#pragma once

#include "opcode_list.cuh"

namespace mk {

struct Noop {
    static constexpr int kOpcode = 0;
    static constexpr int kNumSemaphores = 0;
    static constexpr Role kPrefetchGate = Role::kLoader;

    struct Controller {
        template <class Globals>
        __device__ static int arrival_count(const Globals&, int) {
            return 0;
        }
        template <class Globals>
        __device__ static int released_page(const Globals&, const int32_t*, int k) {
            return k;
        }
    };
    struct Loader {
        template <class Globals, class State>
        __device__ static void run(const Globals&, State& state) {
            state.pass_pages_from(0, threadIdx.x % kWarpThreads);
        }
    };
    using Consumer = Idle;
    using Storer = Idle;
    using Launcher = Idle;
};

}  // namespace mk
