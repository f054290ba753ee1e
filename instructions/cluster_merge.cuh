// The end of a partial that CTAs of one cluster share, mates. Each has worked on KV positions of
// its own. Now each sends its result to the mates, every one its share of the latent columns,
// straight into their shared memory; merges what it gets; and writes it: to the output, or to the
// one scratch slot that they have.
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
    kLsesHere,     // of all are in the inbox
    kColumnsHere,  // of the others; and the LSE of all
    kMatesStored,  // for the first of them
    kNumClusterBarriers,
};

// The power of two that brings floats up to `bound` below 2^15, and its inverse. Halves reach 2^29
// times farther down than that with all of their bits. Infinities and NaN stay what they are.
struct HalfRange {
    static constexpr int kSignificandBits = 23, kBias = 127;  // of a float
    static constexpr int kMost = 15;                          // log2 of what stays finite
    static constexpr uint32_t kLeast = 24;  // biased exponent: smaller ones are scaled by 2^117

    float scale, inverse;

    __device__ explicit HalfRange(float bound) {
        // bound < 2^(exponent + 1 - kBias)
        const uint32_t exponent = max(__float_as_uint(bound) >> kSignificandBits, kLeast);
        scale = __uint_as_float(2 * kBias - 1 + kMost - exponent << kSignificandBits);
        inverse = __uint_as_float(exponent + 1 - kMost << kSignificandBits);
    }
};

template <class Config>
class ClusterMerge {
    using State = mk::State<Config>;
    using Element = typename Config::Element;
    using Pages = PartialPages<Config>;
    static_assert(kNumClusterBarriers <= Config::kNumClusterBarriers);

    static constexpr bool kSendsHalves = !Config::kNarrow;
    // To copy them to the inbox is in the way of what is sent. (Rows of a narrow kernel are staged
    // sixteen at a time. With a page for the others it is up to 2% slower, H200.)
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

    // What a mate says of a row as a whole.
    struct RowNote {
        float lse_log2;
        float scale;  // of its columns, if they are halves
    };

  public:
    using Sent = std::conditional_t<kSendsHalves, kittens::half, float>;

    __device__ ClusterMerge(const MlaGlobals& g, const State& state, const PartialWork& work)
        : g(g), state(state), work(work), inbox(mk::ptx::smem_address(state.page(kInboxPage))) {}

    // By one warp, when all consumers have read what lies in the inbox.
    __device__ void open_inbox() const {
        const int lane = mk::ptx::thread_in_cta() % mk::kWarpThreads;
        const uint32_t open = state.cluster_barrier(kInboxesOpen);
        if (lane == work.mate) {
            const uint32_t note_bytes = work.num_mates * row_bytes(sizeof(float));
            expect(kLsesHere, note_bytes, mk::kMaxClusterCtas);
            expect(kColumnsHere,
                   (work.num_mates - 1) * row_bytes(kChunkBytes << chunks_log2()) +
                       (kSendsHalves ? note_bytes : 0),
                   mk::kMaxClusterCtas - 1);
            mk::ptx::mbar_arrive(open, mk::kMaxClusterCtas - work.num_mates + 1);
        } else if (lane < work.num_mates) {
            mk::ptx::mbar_arrive_at(at_mate(open, lane));
        }
        __syncwarp();
    }
    __device__ void wait_open() const { state.wait_cluster(kInboxesOpen); }

    // A row's LSE, to one of all mates.
    __device__ void send_lse(int row, int mate, float lse_log2) const {
        send(note_offset(work.mate, row) + offsetof(RowNote, lse_log2), mate, lse_log2, kLsesHere);
    }
    // What a row's columns in one half are to be multiplied with, to one of half_mates().
    __device__ void send_scale(int row, int mate, float scale) const {
        send(note_offset(work.mate, row) + offsetof(RowNote, scale), mate, scale, kColumnsHere);
    }
    // So many mates write columns of the left half, and as many of the right one.
    __device__ int half_mates() const { return work.num_mates / 2; }

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

    // By the launcher, while columns are on their way: the LSE of all mates, a row a lane.
    __device__ void add_lses() const {
        state.wait_cluster(kLsesHere);
        const int lane = mk::ptx::thread_in_cta() % mk::kWarpThreads;
#pragma unroll 1
        for (int row = lane; row < work.num_rows; row += mk::kWarpThreads) {
            float lse_log2[mk::kMaxClusterCtas], top = RowState::kNoMax;
#pragma unroll
            for (int mate = 0; mate < mk::kMaxClusterCtas; ++mate) {
                lse_log2[mate] = mate < work.num_mates ? note(mate, row).lse_log2 : -INFINITY;
                top = fmaxf(top, lse_log2[mate]);
            }
            float total = 0.f;
#pragma unroll
            for (const float own : lse_log2) total += mk::ptx::exp2_approx(own - top);
            const bool seen = total > 0.f;  // did any mate see a key
            if (work.mate == 0) work.store_lse(g, row, seen ? top + __log2f(total) : -INFINITY);
            total += mk::ptx::exp2_approx(work.sink_log2(g, row) - top);
            mk::ptx::store_smem_float(merged_lse_log2(row), seen ? top + __log2f(total) : INFINITY);
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

    // Of each mate, all rows with the columns that are this CTA's; then the notes, and of each row
    // the LSE of all.
    const uint32_t inbox;

    // Halves have room where Q was, and that is read before the last keys are.
    static constexpr int kInboxPage = kSendsHalves ? 0 : Pages::kQPages;
    static constexpr int kInboxPages = kSendsHalves ? Pages::kQPages : Pages::kRing;
    static constexpr uint32_t kChunkBytes = kColumnChunk * sizeof(Sent);
    static constexpr uint32_t kRowBytes = kLatentDim * sizeof(Sent);
    static_assert(kMaxRows * (kRowBytes + mk::kMaxClusterCtas * sizeof(RowNote) + sizeof(float)) <=
                      kInboxPages * Config::kSmemPageBytes,
                  "the inbox holds this CTA's share of all mates' columns");

    // Chunks of 64 columns that a mate has.
    __device__ int chunks_log2() const { return kChunksLog2 - (31 - __clz(work.num_mates)); }
    __device__ int first_col(int mate) const { return mate << chunks_log2() + kChunkColumnsLog2; }

    __device__ uint32_t row_bytes(uint32_t bytes) const { return work.num_rows * bytes; }
    __device__ uint32_t note_offset(int mate, int row) const {
        return row_bytes(kRowBytes) +
               (mate * work.num_rows + row) * static_cast<uint32_t>(sizeof(RowNote));
    }
    __device__ uint32_t at_mate(uint32_t address, int mate) const {
        return mk::ptx::address_at(address, mk::ptx::cluster_rank() - work.mate + mate);
    }
    // (In a launch that has failed the mate may have left.)
    __device__ void send(uint32_t offset, int mate, float value, ClusterBarrier here) const {
        if (state.failed()) return;
        mk::ptx::send_float(
            at_mate(inbox + offset, mate), value, at_mate(state.cluster_barrier(here), mate));
    }
    __device__ void expect(ClusterBarrier barrier, uint32_t bytes, int arrivals) const {
        const uint32_t mbar = state.cluster_barrier(barrier);
        mk::ptx::mbar_arrive(mbar, arrivals - 1);
        mk::ptx::mbar_arrive_expect_tx(mbar, bytes);
    }

    __device__ RowNote note(int mate, int row) const {
        const uint2 bits = mk::ptx::load_smem_uint2(inbox + note_offset(mate, row));
        return {__uint_as_float(bits.x), __uint_as_float(bits.y)};
    }

    // Where the LSE of all mates is, sinks included; infinite where no mate has seen a key.
    __device__ uint32_t merged_lse_log2(int row) const {
        return inbox + note_offset(work.num_mates, 0) + row * static_cast<uint32_t>(sizeof(float));
    }

    // The number of mates is known to the compiler: this is executed for every row, and waits for
    // its instructions. A row that saw no key has zeros.
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
            const float merged = mk::ptx::load_smem_float(merged_lse_log2(row));
            float4 sum[kOwnChunks] = {};
#pragma unroll
            for (int mate = 0; mate < kMates; ++mate) {
                const RowNote of_row = note(mate, row);
                float weight = mk::ptx::exp2_approx(of_row.lse_log2 - merged);
                if (kSendsHalves) weight *= of_row.scale;
                const uint32_t of_this = mate == work.mate ? own : from + mate * of_mate;
#pragma unroll
                for (int chunk = 0; chunk < kOwnChunks; ++chunk) {
                    add(sum[chunk], weight, four_columns(of_this + chunk * kChunkBytes, Sent{}));
                }
            }
            to.store(row, sum, merged == INFINITY ? -INFINITY : merged);
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
