// MLA fill: what tokens without keys get, a zero output and the LSE of nothing.
#pragma once

#include "instructions/mla_globals.cuh"
#include "megakernel/opcode_list.cuh"
#include "megakernel/state.cuh"

namespace mla {

template <class Config>
struct MlaFill {
    static constexpr int kOpcode = static_cast<int>(Opcode::kMlaFill);
    static constexpr mk::Role kPrefetchGate = mk::Role::kLoader;
    static constexpr int kNumSemaphores = 0;
    using State = mk::State<Config>;

    struct Controller {
        __device__ static int arrival_count(const MlaGlobals&, int) { return 1; }
        __device__ static int released_page(const MlaGlobals&, const int32_t*, int k) { return k; }
    };

    struct Loader {
        __device__ static void run(const MlaGlobals&, State& state) {
            state.pass_pages_from(0, threadIdx.x % mk::kWarpThreads);
        }
    };

    struct Consumer {
        __device__ static void run(const MlaGlobals& g, State& state) {
            const int64_t first_row =
                static_cast<int64_t>(state.word(FillWords::kTokenBegin)) * g.num_heads;
            const int num_rows =
                (state.word(FillWords::kTokenEnd) - state.word(FillWords::kTokenBegin)) *
                g.num_heads;
            if (threadIdx.x == 0) state.record(mk::TimingWord::kComputeBegin);
            constexpr int kStoresPerRow = kLatentDim * kElementBytes / sizeof(uint4);
            uint4* out = reinterpret_cast<uint4*>(g.out) + first_row * kStoresPerRow;
#pragma unroll 1
            for (int i = threadIdx.x; i < num_rows * kStoresPerRow; i += kConsumerThreads) {
                out[i] = {0, 0, 0, 0};
            }
#pragma unroll 1
            for (int row = threadIdx.x; row < num_rows; row += kConsumerThreads) {
                const auto flat = static_cast<int>(first_row) + row;
                g.store_lse(flat, -INFINITY);
            }
            if (threadIdx.x == 0) state.record(mk::TimingWord::kComputeEnd);
        }
    };

    using Storer = mk::Idle;
    using Launcher = mk::Idle;
};

}  // namespace mla
