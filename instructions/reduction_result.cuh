// What a reduction writes, however it merges: four columns of a row at a time, and the LSEs of its
// rows.
#pragma once

#include "instructions/reduction_work.cuh"
#include "megakernel/state.cuh"

namespace mla {

// Of something relative to 2^own in a sum relative to 2^top; those that saw no key have none.
__device__ __forceinline__ float weight_of(float own, float top) {
    return own == -INFINITY ? 0.f : mk::ptx::exp2_approx(own - top);
}
// Where there is no weight there may be anything.
__device__ __forceinline__ void add_weighted(float4& sum, const float4& columns, float weight) {
    if (weight == 0.f) return;
    sum.x += weight * columns.x;
    sum.y += weight * columns.y;
    sum.z += weight * columns.z;
    sum.w += weight * columns.w;
}

template <class Config>
class ReductionResult {
    using Element = typename Config::Element;

  public:
    struct Scratch {
        float sink_log2[kMaxRows];
        float lse_log2[kMaxRows];
    };

    __device__ ReductionResult(const MlaGlobals& g, const ReductionWork& work, Scratch& shared)
        : g(g), work(work), shared(shared) {}

    // Four columns of an input, where they lie in shared memory as they came.
    __device__ static float4 columns_of_input(uint32_t address) {
        const float4 columns = mk::ptx::load_smem_float4(address);
        return Config::kStampsResults ? Stamp::values(columns) : columns;
    }

    // While the inputs are not there yet.
    __device__ void note_sinks() const {
        const int row = threadIdx.x;
        if (row < work.num_rows) {
            float sink_log2 = -INFINITY;
            if (g.attn_sink != nullptr && !writes_scratch(work.dst_batch)) {
                sink_log2 = g.sink_log2(work.flat_row + row);
            }
            shared.sink_log2[row] = sink_log2;
        }
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
    }

    // What the sum over a row's inputs, relative to 2^top, is multiplied with.
    __device__ float scale_of(int row, float top, float total) const {
        const float sink = mk::ptx::exp2_approx(shared.sink_log2[row] - top);
        return total > 0.f ? mk::ptx::reciprocal_approx(total + sink) : 0.f;
    }
    __device__ void note_lse(int row, float top, float total) const {
        shared.lse_log2[row] = lse_of(top, total);
    }
    __device__ static float lse_of(float top, float total) {
        const bool seen = total > 0.f;  // did any input see a key
        return seen ? top + __log2f(total) : -INFINITY;
    }

    __device__ float noted_lse(int row) const { return shared.lse_log2[row]; }

    // Row and column as the slice counts them; the row's LSE, for a stamp.
    __device__ void store(int row, int slice_col, const float4& v, float lse_log2) const {
        const int col = work.col_begin + slice_col;
        if (writes_scratch(work.dst_batch)) {
            const int64_t at = g.scratch_row(scratch_slot(work.dst_batch), work.first_row + row);
            float* to = &g.o_scratch[at * kLatentDim + col];
            if constexpr (Config::kStampsResults) {
                const Stamp stamp(mk::launch_epoch<Config>(), col / kVectorColumns);
                store_16_bytes(to, stamp.put_on(v, lse_log2));
            } else {
                *reinterpret_cast<float4*>(to) = unstamped(v);
            }
            return;
        }
        const int64_t at = static_cast<int64_t>(work.flat_row + row) * kLatentDim;
        const uint2 rounded = {round_pair({v.x, v.y}, Element{}),
                               round_pair({v.z, v.w}, Element{})};
        *reinterpret_cast<uint2*>(reinterpret_cast<Element*>(g.out) + at + col) = rounded;
    }

    __device__ void store_lses() const {
        const int row = threadIdx.x;
        if (row >= work.num_rows) return;
        const float lse_log2 = shared.lse_log2[row];
        if (writes_scratch(work.dst_batch)) {
            const int slot = scratch_slot(work.dst_batch);
            g.lse_log2_scratch[g.scratch_row(slot, work.first_row + row)] = lse_log2;
        } else if (work.col_begin == 0) {
            g.store_lse(work.flat_row + row, lse_log2);
        }
    }

  private:
    const MlaGlobals& g;
    const ReductionWork& work;
    Scratch& shared;
};

}  // namespace mla
