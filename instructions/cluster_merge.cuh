// The end of a partial that CTAs of one cluster share, mates. Each has worked on KV positions of
// its own. Now each sends its result to the mates, every one its share of the latent columns,
// straight into their shared memory; merges what it gets; and writes it: to the output, or to the
// one scratch slot that they have.
//
// The columns are sent as they are accumulated. What else mates have to know of a row, and what to
// make of it, is the launcher's to tell and to find out, while the columns are on their way.
//
// What an SM sends takes a cycle for every 15 bytes. So in a wide kernel columns are sent as
// halves, scaled to fit: of each row those of either half by a power of two. In a narrow kernel,
// where there are few of them, to find that scale would take longer than to send floats.
//
// For a CTA's first instruction only. All its pages are its own then and lie in one piece, and it
// is known which CTA has which part.
#pragma once

#include "instructions/partial_work.cuh"
#include "instructions/softmax.cuh"
#include "megakernel/state.cuh"

namespace mla {

// mk::State::cluster_barrier
enum ClusterBarrier {
    kInboxesOpen,  // of all mates
    kNotesHere,    // of all are in the inbox
    kColumnsHere,  // of the others; and what all are to be multiplied with
    kMatesStored,  // for the first of them
    kNumClusterBarriers,
};

// The power of two that brings floats up to `bound` below 2^15, and the log2 of its inverse. Halves
// reach 2^29 times farther down than that with all of their bits. Infinities and NaN stay what they
// are.
struct HalfRange {
    static constexpr int kSignificandBits = 23, kBias = 127;  // of a float
    static constexpr int kMost = 15;                          // log2 of what stays finite
    static constexpr uint32_t kLeast = 24;  // biased exponent: smaller ones are scaled by 2^117

    float scale, log2_inverse;

    __device__ explicit HalfRange(float bound) {
        // bound < 2^(exponent + 1 - kBias)
        const uint32_t exponent = max(__float_as_uint(bound) >> kSignificandBits, kLeast);
        scale = __uint_as_float(2 * kBias - 1 + kMost - exponent << kSignificandBits);
        log2_inverse = static_cast<int>(exponent) + 1 - kMost - kBias;
    }
};

// Of all rows of a CTA's result, in shared memory, 16-byte aligned, in units of log2: LSEs, and
// what the columns of either half are to be multiplied with, so as to be sums of exp(score) V.
struct RowNotes {
    const float *lse, *left_scale, *right_scale;
};

template <class Config>
class ClusterMerge {
    using State = mk::State<Config>;
    using Element = typename Config::Element;
    using Pages = PartialPages<Config>;
    static_assert(kNumClusterBarriers <= Config::kNumClusterBarriers);

    static constexpr bool kSendsHalves = !Config::kNarrow;
    static constexpr int kRowSlots = Config::kRows;
    // To copy halves to the inbox is in the way of what is sent. (Of 32 rows, which are staged
    // sixteen at a time, a page for the others is up to 2% slower, and sixteen rows that stay are
    // 1.2% slower, H200.)
    static constexpr bool kOwnStayStaged = !Config::kNarrow;

    // A thread sums four columns of a row, a team of threads a chunk.
    static constexpr int kTeamThreads = kColumnChunk / 4;
    static constexpr int kTeams = kConsumerThreads / kTeamThreads;
    static constexpr int kChunksLog2 = 3;
    static constexpr int kChunks = 1 << kChunksLog2;
    static_assert(kChunks == kLatentDim / kColumnChunk);
    static_assert(mk::kMaxClusterCtas <= kChunks);
    static constexpr int kChunkColumnsLog2 = 6;
    static_assert(kColumnChunk == 1 << kChunkColumnsLog2);

  public:
    using Sent = std::conditional_t<kSendsHalves, kittens::half, float>;

    // Where Q was there is room for halves, or for sixteen rows of floats; and Q is read before the
    // last keys are, so that mates can be told earlier.
    static constexpr bool kInboxWhereQWas = !Config::kNarrow || Config::kRows == kNarrowestRows;

    __device__ ClusterMerge(const MlaGlobals& g, const State& state, const PartialWork& work)
        : g(g), state(state), work(work), inbox(mk::ptx::smem_address(state.page(kInboxPage))) {}

    // By one warp, when all consumers have read what lies in the inbox.
    __device__ void open_inbox() const {
        const int lane = mk::ptx::thread_in_cta() % mk::kWarpThreads;
        const uint32_t open = state.cluster_barrier(kInboxesOpen);
        if (lane == work.mate) {
            expect(kNotesHere, work.num_mates * 2 * note_bytes(), mk::kMaxClusterCtas);
            expect(kColumnsHere,
                   (work.num_mates - 1) * row_bytes(kChunkBytes << chunks_log2()),
                   mk::kMaxClusterCtas - 1);
            mk::ptx::mbar_arrive(open, mk::kMaxClusterCtas - work.num_mates + 1);
        } else if (lane < work.num_mates) {
            mk::ptx::mbar_arrive_at(at_mate(open, lane));
        }
        __syncwarp();
    }
    __device__ void wait_open() const { state.wait_cluster(kInboxesOpen); }

    // To all mates, by one warp, each lane to one mate, four rows at a time.
    __device__ void send_notes(const RowNotes& notes) const {
        if (state.failed()) return;
        const int lane = mk::ptx::thread_in_cta() % mk::kWarpThreads;
        const int mate = lane & work.num_mates - 1;
        const float* const scales =
            mate < work.num_mates / 2 ? notes.left_scale : notes.right_scale;
        const uint32_t lse = mk::ptx::smem_address(notes.lse),
                       scale = mk::ptx::smem_address(scales);
        const uint32_t lse_there = at_mate(lses_of(work.mate), mate);
        const uint32_t scale_there = at_mate(scales_of(work.mate), mate);
        const uint32_t here = at_mate(state.cluster_barrier(kNotesHere), mate);
        const uint32_t step = mk::kWarpThreads * sizeof(float4) >> mates_log2();
#pragma unroll 1
        for (uint32_t at = (lane >> mates_log2()) * sizeof(float4); at < note_bytes(); at += step) {
            mk::ptx::send_float4(lse_there + at, mk::ptx::load_smem_float4(lse + at), here);
            mk::ptx::send_float4(scale_there + at, mk::ptx::load_smem_float4(scale + at), here);
        }
    }

    // Returns what sends 16 bytes of a row's columns, from `col` on, to the mate whose they are.
    __device__ auto sender(int col) const {
        const int mate = col >> chunks_log2() + kChunkColumnsLog2;
        const uint32_t own = inbox + work.mate * row_bytes(kChunkBytes << chunks_log2()) +
                             (col - first_col(mate)) * static_cast<uint32_t>(sizeof(Sent));
        const bool is_own = mate == work.mate, copies = is_own && !kOwnStayStaged;
        const uint32_t first = is_own ? own : at_mate(own, mate);
        const uint32_t here = at_mate(state.cluster_barrier(kColumnsHere), mate);
        const uint32_t step = kChunkBytes << chunks_log2();
        const bool sends = !is_own && !state.failed();
        return [copies, sends, first, here, step](int row, const float4& columns) {
            if (copies) {
                mk::ptx::store_smem_float4(first + row * step, columns);
            } else if (sends) {
                mk::ptx::send_float4(first + row * step, columns, here);
            }
        };
    }

    // By all consumers. Own columns that stay where they have been staged are at staged(row,
    // column).
    template <class Staged>
    __device__ void merge(Staged staged) const {
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
        state.wait_cluster(kColumnsHere);
        if (work.num_mates == 2) {
            add_up<2>(staged);
        } else if (work.num_mates == 4) {
            add_up<4>(staged);
        } else {
            add_up<8>(staged);
        }
    }

    // By one warp, while columns are on their way, a row a lane: the LSE of all mates, and what
    // each one's columns are to be multiplied with. A row that saw no key has zeros.
    __device__ void weigh() const {
        state.wait_cluster(kNotesHere);
        const int lane = mk::ptx::thread_in_cta() % mk::kWarpThreads;
#pragma unroll 1
        for (int row = lane; row < work.num_rows; row += mk::kWarpThreads) {
            const uint32_t of_row = row * static_cast<uint32_t>(sizeof(float));
            float lse_log2[mk::kMaxClusterCtas], top = RowState::kNoMax;
#pragma unroll
            for (int mate = 0; mate < mk::kMaxClusterCtas; ++mate) {
                lse_log2[mate] = -INFINITY;
                if (mate < work.num_mates) {
                    lse_log2[mate] = mk::ptx::load_smem_float(lses_of(mate) + of_row);
                }
                top = fmaxf(top, lse_log2[mate]);
            }
            float total = 0.f;
#pragma unroll
            for (const float own : lse_log2) total += mk::ptx::exp2_approx(own - top);
            const bool seen = total > 0.f;  // did any mate see a key
            if (work.mate == 0) work.store_lse(g, row, seen ? top + __log2f(total) : -INFINITY);
            total += mk::ptx::exp2_approx(work.sink_log2(g, row) - top);
            const float merged = seen ? top + __log2f(total) : INFINITY;
#pragma unroll
            for (int mate = 0; mate < mk::kMaxClusterCtas; ++mate) {
                const uint32_t scale = scales_of(mate) + of_row;
                if (mate < work.num_mates) {
                    const float scale_log2 = mk::ptx::load_smem_float(scale);
                    mk::ptx::store_smem_float(scale, mk::ptx::exp2_approx(scale_log2 - merged));
                }
            }
            if (Config::kStampsResults) {
                mk::ptx::store_smem_float(lses_of(0) + of_row, seen ? merged : -INFINITY);
            }
        }
        __syncwarp();
        if (lane == 0) mk::ptx::mbar_arrive(state.cluster_barrier(kColumnsHere));
    }

    // By the storer, when this CTA's share has been written. True for the one that speaks for all
    // of them.
    __device__ bool all_stored() const {
        const uint32_t stored = state.cluster_barrier(kMatesStored);
        if (work.mate > 0) {
            mk::ptx::mbar_release_at(at_mate(stored, 0));
            return false;
        }
        mk::ptx::mbar_arrive(stored, mk::kMaxClusterCtas - work.num_mates + 1);
        const bool ok = state.wait_cluster(kMatesStored);
        mk::ptx::fence_acq_rel_cluster();
        return ok;
    }

  private:
    const MlaGlobals& g;
    const State& state;
    const PartialWork& work;

    // Of each mate, all rows with the columns that are this CTA's; then of each mate LSEs, and of
    // each mate scales.
    const uint32_t inbox;

    static constexpr int kInboxPage = kInboxWhereQWas ? 0 : Pages::kQPages;
    static constexpr int kInboxPages = kInboxWhereQWas ? Pages::kQPages : Pages::kRing;
    static constexpr uint32_t kChunkBytes = kColumnChunk * sizeof(Sent);
    static constexpr uint32_t kRowBytes = kLatentDim * sizeof(Sent);
    static constexpr uint32_t kNoteBytes = kRowSlots * sizeof(float);
    static_assert(kRowSlots * kRowBytes + 2 * mk::kMaxClusterCtas * kNoteBytes <=
                      kInboxPages * Config::kSmemPageBytes,
                  "the inbox holds this CTA's share of all mates' columns");

    // Chunks of 64 columns that a mate has.
    __device__ int chunks_log2() const { return kChunksLog2 - mates_log2(); }
    __device__ int mates_log2() const { return 31 - __clz(work.num_mates); }
    __device__ int first_col(int mate) const { return mate << chunks_log2() + kChunkColumnsLog2; }

    __device__ uint32_t row_bytes(uint32_t bytes) const { return work.num_rows * bytes; }
    // Behind the columns.
    __device__ uint32_t lses_of(int mate) const {
        return inbox + row_bytes(kRowBytes) + mate * kNoteBytes;
    }
    __device__ uint32_t scales_of(int mate) const { return lses_of(mk::kMaxClusterCtas + mate); }
    // Rows are sent in fours.
    __device__ uint32_t note_bytes() const {
        return (work.num_rows + 3) / 4 * static_cast<uint32_t>(sizeof(float4));
    }
    __device__ uint32_t at_mate(uint32_t address, int mate) const {
        return mk::ptx::address_at(address, mk::ptx::cluster_rank() - work.mate + mate);
    }
    __device__ void expect(ClusterBarrier barrier, uint32_t bytes, int arrivals) const {
        const uint32_t mbar = state.cluster_barrier(barrier);
        mk::ptx::mbar_arrive(mbar, arrivals - 1);
        mk::ptx::mbar_arrive_expect_tx(mbar, bytes);
    }

    // The number of mates is known to the compiler: this is executed for every row, and waits for
    // its instructions.
    template <int kMates, class Staged>
    __device__ void add_up(Staged staged) const {
        constexpr int kOwnChunks = kChunks / kMates;
        const int team = mk::ptx::thread_in_cta() / kTeamThreads;
        const int col = mk::ptx::thread_in_cta() % kTeamThreads * 4;
        const uint32_t columns = inbox + col * static_cast<uint32_t>(sizeof(Sent));
        const uint32_t of_mate = row_bytes(kOwnChunks * kChunkBytes);
        const Destination to = destination(first_col(work.mate) + col);
#pragma unroll 1
        for (int row = team; row < work.num_rows; row += kTeams) {
            const uint32_t from = columns + row * (kOwnChunks * kChunkBytes);
            const uint32_t own = kOwnStayStaged ? staged(row, first_col(work.mate) + col)
                                                : from + work.mate * of_mate;
            const uint32_t of_row = row * static_cast<uint32_t>(sizeof(float));
            float4 sum[kOwnChunks] = {};
#pragma unroll
            for (int mate = 0; mate < kMates; ++mate) {
                const float weight = mk::ptx::load_smem_float(scales_of(mate) + of_row);
                const uint32_t of_this = mate == work.mate ? own : from + mate * of_mate;
#pragma unroll
                for (int chunk = 0; chunk < kOwnChunks; ++chunk) {
                    add(sum[chunk], weight, four_columns(of_this + chunk * kChunkBytes, Sent{}));
                }
            }
            float lse_log2 = 0.f;
            if (Config::kStampsResults) lse_log2 = mk::ptx::load_smem_float(lses_of(0) + of_row);
            to.store(row, sum, lse_log2);
        }
    }
    __device__ static float4 four_columns(uint32_t from, float) {
        return mk::ptx::load_smem_float4(from);
    }
    __device__ static float4 four_columns(uint32_t from, kittens::half) {
        const uint2 pairs = mk::ptx::load_smem_uint2(from);
        const float2 first = __half22float2(*reinterpret_cast<const __half2*>(&pairs.x));
        const float2 second = __half22float2(*reinterpret_cast<const __half2*>(&pairs.y));
        return {first.x, first.y, second.x, second.y};
    }
    __device__ static void add(float4& sum, float weight, const float4& x) {
        sum.x += weight * x.x;
        sum.y += weight * x.y;
        sum.z += weight * x.z;
        sum.w += weight * x.w;
    }

    // Where a row's columns go.
    struct Destination {
        float* scratch;  // or null
        Element* out;

        // Four columns of each of the CTA's chunks. The LSE is wanted where results are stamped.
        template <int kOwnChunks>
        __device__ void store(int row, const float4 (&x)[kOwnChunks], float lse_log2) const {
            if (scratch != nullptr) {
#pragma unroll
                for (int i = 0; i < kOwnChunks; ++i) {
                    float* to = scratch + row * kLatentDim + i * kColumnChunk;
                    if constexpr (Config::kStampsResults) {
                        const Stamp stamp(mk::launch_epoch<Config>(), mk::ptx::thread_in_cta());
                        store_16_bytes(to, stamp.put_on(x[i], lse_log2));
                    } else {
                        store_16_bytes(to, x[i]);
                    }
                }
                return;
            }
#pragma unroll
            for (int i = 0; i < kOwnChunks; ++i) {
                const uint2 rounded = {round_pair({x[i].x, x[i].y}, Element{}),
                                       round_pair({x[i].z, x[i].w}, Element{})};
                *reinterpret_cast<uint2*>(out + row * kLatentDim + i * kColumnChunk) = rounded;
            }
        }
    };
    __device__ Destination destination(int col) const {
        if (writes_scratch(work.dst_batch)) {
            const int64_t first = g.scratch_row(scratch_slot(work.dst_batch), 0);
            return {g.o_scratch + first * kLatentDim + col, nullptr};
        }
        const int64_t first = work.flat_row(g, 0);
        return {nullptr, reinterpret_cast<Element*>(g.out) + first * kLatentDim + col};
    }
};

}  // namespace mla
