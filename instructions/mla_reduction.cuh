// MLA reduction: merges the partial outputs of one token over a slice of heads
// and columns, weighted by their log-sum-exps.
//
//     loader     waits for the pages
//     launcher   waits for the inputs' flags, a lane per input; then bulk-copies unit after unit
//     consumers  weigh and sum: a warpgroup per unit, four columns per thread and step
//     storer     raises the flag when the result is an input of another reduction
//
// A unit is what one page holds: some heads' rows, or a piece of one head's row, of every input.
#pragma once

#include "instructions/mla_globals.cuh"
#include "megakernel/state.cuh"

namespace mla {

template <class Config>
struct MlaReduction {
    static constexpr int kOpcode = static_cast<int>(Opcode::kMlaReduction);
    static constexpr mk::Role kPrefetchGate = mk::Role::kLauncher;
    using State = mk::State<Config>;
    using Words = ReductionWords;

    static constexpr int kUnitPages = Config::kNumSmemPages;
    // Whole rows lie one after the other, so that one copy brings several; otherwise a unit is a
    // piece of one row.
    static constexpr int kWholeRows = Config::kSmemPageBytes / (kLatentDim * sizeof(float));
    static constexpr int kPieceCols = 256;
    static_assert(kMaxReductionInputs * kPieceCols * sizeof(float) <= Config::kSmemPageBytes,
                  "a piece of every input fits a page");
    static_assert(kWholeRows <= mk::kWarpThreads && kMaxReductionInputs <= mk::kWarpThreads,
                  "a lane per row of every input");
    static_assert(kUnitPages % 2 == 0, "a page always meets the same warpgroup");

    enum Semaphore {
        kPagesGranted = 0,
        kInputsVisible,                       // the inputs' flags are up: LSEs may be read
        kResultStored,                        // consumers have written their part
        kUnitFull,                            // + page
        kUnitEmpty = kUnitFull + kUnitPages,  // + page
        kCount = kUnitEmpty + kUnitPages,
    };
    static constexpr int kNumSemaphores = kCount;

    // The words, decoded.
    struct Work {
        int num_inputs, head_begin, num_heads, col_begin, num_cols, dst_batch, token;
        int unit_rows, unit_cols, num_units;

        __device__ Work(const MlaGlobals& g, const State& state) {
            const auto shape = ReductionShape::unpack(state.word(Words::kShape));
            num_inputs = shape.num_inputs;
            head_begin = shape.head_begin;
            num_heads = shape.num_heads == 0 ? g.num_heads : shape.num_heads;
            col_begin = shape.col_begin;
            num_cols = shape.num_cols == 0 ? kLatentDim : shape.num_cols;
            dst_batch = state.word(Words::kDstBatch);
            token = state.word(Words::kDstSeq);
            const bool whole = num_cols == kLatentDim && num_inputs <= kWholeRows;
            unit_rows = whole ? min(kWholeRows / num_inputs, num_heads) : 1;
            unit_cols = whole ? kLatentDim : min(num_cols, kPieceCols);
            num_units = (num_heads + unit_rows - 1) / unit_rows * units_per_row();
        }
        __device__ int units_per_row() const { return (num_cols + unit_cols - 1) / unit_cols; }
        // First of a unit's rows, as a head.
        __device__ int head(int unit) const {
            return head_begin + unit / units_per_row() * unit_rows;
        }
        __device__ int rows(int unit) const {
            return min(unit_rows, head_begin + num_heads - head(unit));
        }
        __device__ int first_col(int unit) const {
            return col_begin + unit % units_per_row() * unit_cols;
        }
        __device__ int cols(int unit) const {
            return min(unit_cols, col_begin + num_cols - first_col(unit));
        }
        // Where row 0 of this token begins in a slot or in the output, in rows.
        __device__ int64_t token_row(const MlaGlobals& g, int slot_or_batch) const {
            return g.first_row(slot_or_batch) + static_cast<int64_t>(token) * g.num_heads;
        }
    };

    struct Controller {
        __device__ static int arrival_count(const MlaGlobals&, int semaphore) {
            if (semaphore == kResultStored) return Config::kNumConsumerWarps;
            return semaphore >= kUnitEmpty ? 4 : 1;  // a warpgroup's warps empty a unit
        }
        __device__ static int released_page(const MlaGlobals&, const int32_t*, int k) {
            return Config::kNumSmemPages - 1 - k;  // pages without a unit are passed on at once
        }
    };

    struct Loader {
        __device__ static void run(const MlaGlobals& g, State& state) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            const int used = min(Work(g, state).num_units, kUnitPages);
            for (int page = 0; page < used; ++page) state.wait_page(page);
            if (lane == 0) state.arrive(kPagesGranted);
            state.pass_pages_from(used, lane);
        }
    };

    struct Launcher {
        __device__ static void run(const MlaGlobals& g, State& state) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            const Work work(g, state);
            const bool has_input = lane < work.num_inputs;
            const int slot = has_input ? state.word(Words::kInputs + lane) : 0;
            if (lane == 0) state.record(mk::TimingWord::kLoadBegin);
            bool ok = state.wait(kPagesGranted, 0);
            if (has_input) ok = state.wait_done_flag(g.done_flag(slot, work.token), slot) && ok;
            ok = __all_sync(~0u, ok);
            // The inputs may have been written by ordinary stores; the copies below are not.
            mk::ptx::fence_proxy_async_global();
            __syncwarp();
            if (lane == 0) state.arrive(kInputsVisible);

            const float* input = g.o_scratch + work.token_row(g, slot) * kLatentDim;
            for (int unit = 0; unit < work.num_units; ++unit) {
                const int page = unit % kUnitPages;
                const uint32_t bytes = work.rows(unit) * work.cols(unit) * sizeof(float);
                if (unit >= kUnitPages) state.wait(kUnitEmpty + page, unit / kUnitPages - 1);
                if (lane == 0) {
                    mk::ptx::mbar_arrive_expect_tx(state.semaphore(kUnitFull + page),
                                                   bytes * work.num_inputs);
                }
                __syncwarp();
                if (has_input && ok) {
                    mk::ptx::bulk_load(mk::ptx::smem_address(state.page(page)) + lane * bytes,
                                       input + work.head(unit) * kLatentDim + work.first_col(unit),
                                       bytes,
                                       state.semaphore(kUnitFull + page));
                }
            }
            if (lane == 0) state.record(mk::TimingWord::kLoadEnd);
        }
    };

    struct Consumer {
        __device__ static void run(const MlaGlobals& g, State& state) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            const int warpgroup = threadIdx.x / kWarpgroupThreads;
            const Work work(g, state);
            state.wait(kInputsVisible, 0);
            if (threadIdx.x == 0) state.record(mk::TimingWord::kComputeBegin);
            float next_lse = load_lse(g, state, work, warpgroup);
            for (int unit = warpgroup; unit < work.num_units; unit += 2) {
                const int page = unit % kUnitPages;
                const float lse = next_lse;
                next_lse = load_lse(g, state, work, unit + 2);
                const Weights weights = weigh(work, lse);
                if (threadIdx.x % kWarpgroupThreads < mk::kWarpThreads) {
                    store_lse(g, work, unit, weights.lse_log2);
                }
                state.wait(kUnitFull + page, unit / kUnitPages);
                merge(g, work, unit, mk::ptx::smem_address(state.page(page)), weights.share);
                __syncwarp();
                if (lane != 0) continue;
                if (unit + kUnitPages < work.num_units) {
                    state.arrive(kUnitEmpty + page);
                } else {
                    state.release_page(page, 1);
                }
            }
            if (threadIdx.x == 0) state.record(mk::TimingWord::kComputeEnd);
            __syncwarp();
            if (lane == 0) state.arrive(kResultStored);
        }

      private:
        // Of the lane's (row, input): lane = row * num_inputs + input.
        struct Weights {
            float share;
            float lse_log2;  // of the merged row
        };

        // Base-2 LSE of the lane's (row, input); -inf past the last.
        __device__ static float load_lse(const MlaGlobals& g,
                                         const State& state,
                                         const Work& work,
                                         int unit) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            if (unit >= work.num_units || lane >= work.rows(unit) * work.num_inputs) {
                return -INFINITY;
            }
            const int slot = state.word(Words::kInputs + lane % work.num_inputs);
            // Past L1: the line may have been read in an earlier launch.
            return __ldcg(&g.lse_log2_scratch[work.token_row(g, slot) + work.head(unit) +
                                              lane / work.num_inputs]);
        }

        __device__ static Weights weigh(const Work& work, float lse) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            const int first = lane / work.num_inputs * work.num_inputs;
            float top = -INFINITY;
#pragma unroll 9
            for (int i = 0; i < work.num_inputs; ++i) {
                top = fmaxf(top, __shfl_sync(~0u, lse, first + i));
            }
            const bool seen = top != -INFINITY;  // did any input see a key
            const float share = seen ? mk::ptx::exp2_approx(lse - top) : 0.f;
            float total = 0.f;
#pragma unroll 9
            for (int i = 0; i < work.num_inputs; ++i) {
                total += __shfl_sync(~0u, share, first + i);
            }
            return {seen ? share / total : 0.f, seen ? top + __log2f(total) : -INFINITY};
        }

        // The first lane of each row writes the row's LSE: into scratch for whoever reads this
        // slice, into the output from the slice that has column 0.
        __device__ static void store_lse(const MlaGlobals& g,
                                         const Work& work,
                                         int unit,
                                         float lse_log2) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            const int row = lane / work.num_inputs;
            if (lane % work.num_inputs != 0 || row >= work.rows(unit)) return;
            const int head = work.head(unit) + row;
            if (writes_scratch(work.dst_batch)) {
                g.lse_log2_scratch[work.token_row(g, scratch_slot(work.dst_batch)) + head] =
                    lse_log2;
            } else if (work.first_col(unit) == 0) {
                g.store_lse(work.dst_batch, work.token, head, lse_log2);
            }
        }

        // Inputs lie in the page one after the other, each rows x cols.
        __device__ static void merge(
            const MlaGlobals& g, const Work& work, int unit, uint32_t page, float share) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            const int rows = work.rows(unit), cols = work.cols(unit);
            const int chunks_per_row = cols / 4, num_chunks = rows * chunks_per_row;
            const int first_chunk =
                threadIdx.x % kWarpgroupThreads / mk::kWarpThreads * mk::kWarpThreads;
            for (int base = first_chunk; base < num_chunks; base += kWarpgroupThreads) {
                const int chunk = min(base + lane, num_chunks - 1);
                const int row = chunk / chunks_per_row;
                float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 9
                for (int i = 0; i < work.num_inputs; ++i) {
                    const float weight = __shfl_sync(~0u, share, row * work.num_inputs + i);
                    const float4 value =
                        mk::ptx::load_smem_float4(page + (i * num_chunks + chunk) * sizeof(float4));
                    sum.x += weight * value.x;
                    sum.y += weight * value.y;
                    sum.z += weight * value.z;
                    sum.w += weight * value.w;
                }
                if (base + lane < num_chunks) {
                    store(g,
                          work,
                          work.head(unit) + row,
                          work.first_col(unit) + chunk % chunks_per_row * 4,
                          sum);
                }
            }
        }

        __device__ static void store(
            const MlaGlobals& g, const Work& work, int head, int col, float4 sum) {
            const bool scratch = writes_scratch(work.dst_batch);
            const int dst = scratch ? scratch_slot(work.dst_batch) : work.dst_batch;
            const int64_t at = (work.token_row(g, dst) + head) * kLatentDim + col;
            if (scratch) {
                *reinterpret_cast<float4*>(g.o_scratch + at) = sum;
            } else {
                const __nv_bfloat162 pairs[2] = {__float22bfloat162_rn({sum.x, sum.y}),
                                                 __float22bfloat162_rn({sum.z, sum.w})};
                *reinterpret_cast<uint2*>(g.o_ptr + at) = *reinterpret_cast<const uint2*>(pairs);
            }
        }
    };

    struct Storer {
        __device__ static void run(const MlaGlobals& g, State& state) {
            if (threadIdx.x % mk::kWarpThreads != 0) return;
            const Work work(g, state);
            const bool ok = state.wait(kResultStored, 0);
            state.record(mk::TimingWord::kStoreBegin);
            if (ok && writes_scratch(work.dst_batch)) {
                int32_t* flag = g.done_flag(scratch_slot(work.dst_batch), work.token);
                state.raise_done_flags(flag, flag);
            }
            state.record(mk::TimingWord::kStoreEnd);
        }
    };
};

}  // namespace mla
