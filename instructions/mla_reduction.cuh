// MLA reduction: merges scratch slots of one row group over a slice of rows and
// columns, weighted by their log-sum-exps.
//
//     launcher   waits for the inputs' flags
//     consumers  sixteen teams of sixteen threads. A team sums a chunk, 64 columns of one row, out
//                of L2; where there are fewer chunks than teams, several teams share one
//     storer     raises the flag when the result is an input of another reduction
//
// It has no use for pages, so the next partial's loads begin under it.
#pragma once

#include "instructions/mla_globals.cuh"
#include "megakernel/opcode_list.cuh"
#include "megakernel/state.cuh"

namespace mla {

template <class Config>
struct MlaReduction {
    static constexpr int kOpcode = static_cast<int>(Opcode::kMlaReduction);
    static constexpr mk::Role kPrefetchGate = mk::Role::kLauncher;
    using State = mk::State<Config>;
    using Element = typename Config::Element;
    using Words = ReductionWords;

    static constexpr int kColumnsPerThread = 4;
    static constexpr int kTeamThreads = kColumnChunk / kColumnsPerThread;
    static constexpr int kTeams = kConsumerThreads / kTeamThreads;
    // Inputs that a thread asks for before it needs the first: what hides L2's latency. With few
    // inputs, those of several chunks.
    static constexpr int kInFlight = Config::kConsumerRegisters < 176 ? 16 : 20;

    enum Semaphore {
        kInputsVisible = 0,  // the inputs' flags are up
        kResultStored,       // consumers have written their part
        kCount,
    };
    static constexpr int kNumSemaphores = kCount;

    // The words, decoded.
    struct Work {
        const int32_t* listed;  // null: a run
        int num_inputs, run_first, run_step;
        int dst_batch, first_row, num_rows, col_begin, num_cols;
        int flat_row;        // first_row as the output counts it
        int rows_per_chunk;  // in 1/65536

        __device__ Work(const MlaGlobals& g, const State& state) {
            const auto shape = ReductionShape::unpack(state.word(Words::kShape));
            listed = shape.is_run ? nullptr : state.words() + Words::kInputs;
            num_inputs = shape.is_run ? state.word(Words::kRunCount) : shape.num_listed;
            run_first = state.word(Words::kRunFirst);
            run_step = state.word(Words::kRunStep);
            dst_batch = state.word(Words::kDstBatch);
            const int row_offset = shape.is_run ? state.word(Words::kRunRowOffset) : 0;
            first_row = state.word(Words::kDstSeq) * g.num_heads + shape.head_begin + row_offset;
            flat_row = first_row;
            if (!writes_scratch(dst_batch)) flat_row += g.tokens_of(dst_batch).first * g.num_heads;
            num_rows = shape.num_rows > 0 ? shape.num_rows : g.num_heads - shape.head_begin;
            col_begin = shape.col_begin;
            num_cols = shape.num_cols > 0 ? shape.num_cols : kLatentDim - col_begin;
            rows_per_chunk = (1 << 16) / chunks_per_row() + 1;
        }
        __device__ int slot(int input) const {
            return listed != nullptr ? listed[input] : run_first + input * run_step;
        }
        __device__ int chunks_per_row() const { return num_cols / kColumnChunk; }
        __device__ int num_chunks() const { return num_rows * chunks_per_row(); }
        // chunk / chunks_per_row(), exact for as many chunks as there can be.
        __device__ int row_of_chunk(int chunk) const { return chunk * rows_per_chunk >> 16; }
        // Teams per chunk: a power of two, so that all chunks fit side by side if there are
        // several.
        __device__ int teams_per_chunk() const {
            int teams = 1;
            while (2 * teams * num_chunks() <= kTeams && teams < num_inputs) teams *= 2;
            return teams;
        }
    };

    struct Controller {
        __device__ static int arrival_count(const MlaGlobals&, int semaphore) {
            return semaphore == kResultStored ? Config::kNumConsumerWarps : 1;
        }
        __device__ static int released_page(const MlaGlobals&, const int32_t*, int k) { return k; }
    };

    struct Loader {
        __device__ static void run(const MlaGlobals&, State& state) {
            state.pass_pages_from(0, threadIdx.x % mk::kWarpThreads);
        }
    };

    struct Launcher {
        __device__ static void run(const MlaGlobals& g, State& state) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            const Work work(g, state);
            if (lane == 0) state.record(mk::TimingWord::kLoadBegin);
            // Lane l waits for inputs l, l + 32, ...
            const int count = (work.num_inputs - lane + mk::kWarpThreads - 1) / mk::kWarpThreads;
            state.wait_done_flags(g.done_flags, count, 0, [&](int i) {
                return work.slot(lane + i * mk::kWarpThreads);
            });
            __syncwarp();
            if (lane == 0) {
                state.record(mk::TimingWord::kLoadEnd);
                state.arrive(kInputsVisible);
            }
        }
    };

    using Feeder = mk::Idle;

    struct Consumer {
        __device__ static void run(const MlaGlobals& g, State& state) {
            const Work work(g, state);
            note_sinks(g, state, work);
            state.wait(kInputsVisible, 0);
            if (threadIdx.x == 0) state.record(mk::TimingWord::kComputeBegin);
            const int sharing = work.teams_per_chunk();
            if (sharing > 1) {
                merge_shared(g, state, work, sharing);
            } else if (work.num_inputs <= 2) {
                merge_few<2>(g, state, work);
            } else if (work.num_inputs <= 4) {
                merge_few<4>(g, state, work);
            } else {
                merge_many(g, state, work);
            }
            barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
            store_lses(g, state, work);
            if (threadIdx.x == 0) state.record(mk::TimingWord::kComputeEnd);
            __syncwarp();
            if (threadIdx.x % mk::kWarpThreads == 0) state.arrive(kResultStored);
            // Nobody begins the next instruction's scratch before all have read this one's.
            barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        }

      private:
        // Four columns of one row, summed over inputs: values relative to 2^top.
        struct Sum {
            float4 value = {0.f, 0.f, 0.f, 0.f};
            float top = -INFINITY;
            float total = 0.f;

            __device__ void rescale(float to) {
                const float factor = top == -INFINITY ? 0.f : mk::ptx::exp2_approx(top - to);
                value.x *= factor;
                value.y *= factor;
                value.z *= factor;
                value.w *= factor;
                total *= factor;
                top = to;
            }
            __device__ void add_weighted(const float4& v, float weight) {
                value.x += weight * v.x;
                value.y += weight * v.y;
                value.z += weight * v.z;
                value.w += weight * v.w;
            }
            __device__ void add(const Sum& other) {
                const float to = fmaxf(top, other.top);
                if (to == -INFINITY) return;
                rescale(to);
                const float weight =
                    other.top == -INFINITY ? 0.f : mk::ptx::exp2_approx(other.top - to);
                add_weighted(other.value, weight);
                total += weight * other.total;
            }

            // Those of inputs whose LSEs are all -inf change nothing.
            template <int kCount>
            __device__ void add_inputs(const float (&lse_log2)[kCount],
                                       const float4 (&values)[kCount]) {
                float to = top;
#pragma unroll
                for (int i = 0; i < kCount; ++i) to = fmaxf(to, lse_log2[i]);
                if (to == -INFINITY) return;
                rescale(to);
#pragma unroll
                for (int i = 0; i < kCount; ++i) {
                    const float weight = mk::ptx::exp2_approx(lse_log2[i] - to);
                    total += weight;
                    add_weighted(values[i], weight);
                }
            }
        };

        // Where a thread works: a row of the instruction, and the first of four columns.
        struct Place {
            int row, col;
            __device__ Place(const Work& work, int chunk)
                : row(work.row_of_chunk(chunk)),
                  col(work.col_begin + (chunk - row * work.chunks_per_row()) * kColumnChunk +
                      threadIdx.x % kTeamThreads * kColumnsPerThread) {}
        };

        // An input of a place; nothing if there is none. Past L1: a line may have been read in an
        // earlier launch.
        __device__ static void load(const MlaGlobals& g,
                                    const Work& work,
                                    const Place& place,
                                    int input,
                                    bool exists,
                                    float& lse_log2,
                                    float4& value) {
            lse_log2 = -INFINITY;
            value = {0.f, 0.f, 0.f, 0.f};
            if (!exists) return;
            const int at = work.slot(input) * g.slot_rows + (work.first_row + place.row) % kMaxRows;
            lse_log2 = __ldcg(g.lse_log2_scratch + at);
            value = __ldcg(reinterpret_cast<const float4*>(
                g.o_scratch + static_cast<int64_t>(at) * kLatentDim + place.col));
        }

        // A team per chunk. Few inputs: those of several chunks at a time.
        template <int kInputs>
        __device__ static void merge_few(const MlaGlobals& g,
                                         const State& state,
                                         const Work& work) {
            constexpr int kChunks = kInFlight / kInputs;
            for (int first = threadIdx.x / kTeamThreads; first < work.num_chunks();
                 first += kChunks * kTeams) {
                float lse_log2[kChunks][kInputs];
                float4 values[kChunks][kInputs];
#pragma unroll
                for (int c = 0; c < kChunks; ++c) {
                    const int chunk = first + c * kTeams;
                    const Place place(work, chunk);
#pragma unroll
                    for (int i = 0; i < kInputs; ++i) {
                        const bool exists = chunk < work.num_chunks() && i < work.num_inputs;
                        load(g, work, place, i, exists, lse_log2[c][i], values[c][i]);
                    }
                }
#pragma unroll
                for (int c = 0; c < kChunks; ++c) {
                    const int chunk = first + c * kTeams;
                    if (chunk >= work.num_chunks()) break;
                    Sum sum;
                    sum.add_inputs(lse_log2[c], values[c]);
                    store(g, state, work, Place(work, chunk), sum);
                }
            }
        }
        __device__ static void merge_many(const MlaGlobals& g,
                                          const State& state,
                                          const Work& work) {
            for (int chunk = threadIdx.x / kTeamThreads; chunk < work.num_chunks();
                 chunk += kTeams) {
                const Place place(work, chunk);
                store(g, state, work, place, sum_of(g, work, place, 0, 1));
            }
        }

        // Over inputs first, first + step, ...
        __device__ static Sum sum_of(
            const MlaGlobals& g, const Work& work, const Place& place, int first, int step) {
            Sum sum;
            for (int input = first; input < work.num_inputs; input += kInFlight * step) {
                float lse_log2[kInFlight];
                float4 values[kInFlight];
#pragma unroll
                for (int i = 0; i < kInFlight; ++i) {
                    const int at = input + i * step;
                    load(g, work, place, at, at < work.num_inputs, lse_log2[i], values[i]);
                }
                sum.add_inputs(lse_log2, values);
            }
            return sum;
        }

        // Several teams per chunk, each with its share of the inputs; the first of them adds up.
        __device__ static void merge_shared(const MlaGlobals& g,
                                            const State& state,
                                            const Work& work,
                                            int sharing) {
            const int team = threadIdx.x / kTeamThreads, lane = threadIdx.x % kTeamThreads;
            const int chunk = team / sharing, part = team % sharing;
            const bool has_chunk = chunk < work.num_chunks();
            const Place place(work, chunk);
            if (has_chunk) {
                scratch(state).parts[team][lane] = sum_of(g, work, place, part, sharing);
            }
            barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
            if (has_chunk && part == 0) {
                Sum sum;
                for (int other = 0; other < sharing; ++other) {
                    sum.add(scratch(state).parts[team + other][lane]);
                }
                store(g, state, work, place, sum);
            }
        }

        // Where a partial keeps P, which it has read before its last barrier.
        struct Scratch {
            Sum parts[kTeams][kTeamThreads];
            float sink_log2[kMaxRows];
            float lse_log2[kMaxRows];
        };
        static_assert(sizeof(Scratch) <= Config::kScratchBytes);
        __device__ static Scratch& scratch(const State& state) {
            return *reinterpret_cast<Scratch*>(state.scratch());
        }

        // While the inputs are not there yet.
        __device__ static void note_sinks(const MlaGlobals& g,
                                          const State& state,
                                          const Work& work) {
            const int row = threadIdx.x;
            if (row < work.num_rows) {
                float sink_log2 = -INFINITY;
                if (g.attn_sink != nullptr && !writes_scratch(work.dst_batch)) {
                    const int flat = work.flat_row + row;
                    sink_log2 = g.sink_log2(flat / g.num_heads, flat % g.num_heads);
                }
                scratch(state).sink_log2[row] = sink_log2;
            }
            barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        }

        __device__ static void store(const MlaGlobals& g,
                                     const State& state,
                                     const Work& work,
                                     const Place& place,
                                     const Sum& sum) {
            const bool seen = sum.total > 0.f;  // did any input see a key
            Scratch& shared = scratch(state);
            if (place.col == work.col_begin) {
                shared.lse_log2[place.row] = seen ? sum.top + __log2f(sum.total) : -INFINITY;
            }
            const float sink = mk::ptx::exp2_approx(shared.sink_log2[place.row] - sum.top);
            const float scale = seen ? mk::ptx::reciprocal_approx(sum.total + sink) : 0.f;
            const float4 v = {
                sum.value.x * scale, sum.value.y * scale, sum.value.z * scale, sum.value.w * scale};
            if (writes_scratch(work.dst_batch)) {
                const int64_t at =
                    g.scratch_row(scratch_slot(work.dst_batch), work.first_row + place.row);
                *reinterpret_cast<float4*>(&g.o_scratch[at * kLatentDim + place.col]) = v;
                return;
            }
            const int64_t at = static_cast<int64_t>(work.flat_row + place.row) * kLatentDim;
            const uint2 rounded = {round_pair({v.x, v.y}, Element{}),
                                   round_pair({v.z, v.w}, Element{})};
            *reinterpret_cast<uint2*>(reinterpret_cast<Element*>(g.out) + at + place.col) = rounded;
        }

        __device__ static void store_lses(const MlaGlobals& g,
                                          const State& state,
                                          const Work& work) {
            const int row = threadIdx.x;
            if (row >= work.num_rows) return;
            const float lse_log2 = scratch(state).lse_log2[row];
            if (writes_scratch(work.dst_batch)) {
                const int slot = scratch_slot(work.dst_batch);
                g.lse_log2_scratch[g.scratch_row(slot, work.first_row + row)] = lse_log2;
            } else if (work.col_begin == 0) {
                const int flat = work.flat_row + row;
                g.store_lse(flat / g.num_heads, flat % g.num_heads, lse_log2);
            }
        }
    };

    struct Storer {
        __device__ static void run(const MlaGlobals& g, State& state) {
            if (threadIdx.x % mk::kWarpThreads != 0) return;
            const int dst_batch = state.word(Words::kDstBatch);
            const bool ok = state.wait(kResultStored, 0);
            state.record(mk::TimingWord::kStoreBegin);
            if (ok && writes_scratch(dst_batch)) {
                state.raise_done_flag(&g.done_flags[scratch_slot(dst_batch)]);
            }
            state.record(mk::TimingWord::kStoreEnd);
        }
    };
};

}  // namespace mla
