// How a merge by chunks of 64 columns of one row is divided: sixteen teams of sixteen threads sum
// chunks over the inputs; where there are fewer chunks than teams, several teams share one.
#pragma once

#include "instructions/reduction_result.cuh"

namespace mla {

template <class Config>
class ChunkTeams {
  public:
    using State = mk::State<Config>;
    using Work = ReductionWork;
    using Result = ReductionResult<Config>;

    static constexpr int kTeamThreads = kColumnChunk / kVectorColumns;
    static constexpr int kTeamThreadsLog2 = 4;
    static constexpr int kTeamsLog2 = 4;
    static constexpr int kTeams = 1 << kTeamsLog2;
    static_assert(kTeams * kTeamThreads == kConsumerThreads);
    static_assert(kTeamThreads == 1 << kTeamThreadsLog2);

    // How what teams have summed of a chunk that they share is added up: by shuffles between lanes
    // that read the same columns of all of them, or team after team. The first is faster (H200:
    // B1_64k_q1_h16 26.7 us instead of 27.2), but in kernels for 32 rows it makes ptxas keep the
    // tile loop's descriptors in vector registers, and partials are 2% slower.
    static constexpr bool kAddsByShuffles = Config::kStampsResults;

    struct Scratch {
        // A pad keeps what neighbouring lanes read, of the same columns, in different banks.
        float4 value[kTeams][kTeamThreads + kAddsByShuffles];
        float top[kTeams], total[kTeams];
    };

    __device__ ChunkTeams(const MlaGlobals& g,
                          const State& state,
                          const Work& work,
                          const Result& result,
                          Scratch& shared)
        : g(g), state(state), work(work), result(result), shared(shared) {
        const int num_chunks = work.num_chunks(), num_inputs = work.num_inputs;
        sharing_log2 = 0;
        while (num_chunks << sharing_log2 + 1 <= kTeams && 1 << sharing_log2 < num_inputs) {
            ++sharing_log2;
        }
        own_inputs = rounded_up(num_inputs, sharing_log2);
    }

    const MlaGlobals& g;
    const State& state;
    const Work& work;
    const Result& result;
    Scratch& shared;
    const int team = threadIdx.x / kTeamThreads, lane = threadIdx.x % kTeamThreads;
    // Powers of two, by their logarithms: what runs once has no time for divisions.
    int sharing_log2;  // teams that share a chunk
    int own_inputs;    // of each of them

    __device__ static int rounded_up(int x, int log2) { return (x + (1 << log2) - 1) >> log2; }

    // Teams side by side have chunks side by side, as many as there are if they are shared.
    __device__ int side_by_side() const { return kTeams >> sharing_log2; }
    // The team's first one; its next ones come kTeams after each other.
    __device__ int first_chunk() const { return team & side_by_side() - 1; }
    // Which of the inputs of a shared chunk are this team's: own_inputs from part * own_inputs on.
    __device__ int part() const { return team >> kTeamsLog2 - sharing_log2; }

    // Four columns of one row, summed over inputs: values relative to 2^top.
    struct Sum {
        float4 value;
        float top, total;

        __device__ void begin() {
            value = {0.f, 0.f, 0.f, 0.f};
            top = -INFINITY;
            total = 0.f;
        }
        __device__ void rescale(float to) {
            const float factor = top == -INFINITY ? 0.f : mk::ptx::exp2_approx(top - to);
            value.x *= factor;
            value.y *= factor;
            value.z *= factor;
            value.w *= factor;
            total *= factor;
            top = to;
        }
    };

    // Over 2^lanes_log2 neighbouring lanes of a team.
    __device__ static float max_of(float x, int lanes_log2) {
#pragma unroll
        for (int i = 0; i < kTeamThreadsLog2; ++i) {
            const float other = __shfl_xor_sync(~0u, x, 1 << i, kTeamThreads);
            if (i < lanes_log2) x = fmaxf(x, other);
        }
        return x;
    }
    __device__ static float sum_of(float x, int lanes_log2) {
#pragma unroll
        for (int i = 0; i < kTeamThreadsLog2; ++i) {
            const float other = __shfl_xor_sync(~0u, x, 1 << i, kTeamThreads);
            if (i < lanes_log2) x += other;
        }
        return x;
    }

    // Writes what the teams have summed, one chunk each, or a part of one.
    __device__ void finish(Sum& sum) const {
        int chunk = first_chunk(), vector = lane;
        if (sharing_log2 > 0) {
            put_down(sum);
            int part = this->part();
            if constexpr (kAddsByShuffles) {
                const int columns = threadIdx.x >> sharing_log2;
                chunk = columns / kTeamThreads;
                vector = columns % kTeamThreads;
                part = threadIdx.x - (columns << sharing_log2);
                add_up_by_lanes(part * side_by_side() + chunk, vector, sum);
            } else {
                add_up_by_teams(sum);
            }
            if (part > 0) return;
        }
        finish_chunk(chunk, vector, sum);
    }

    // ---- results ----------------------------------------------------------------------

    // Of a chunk the `vector`-th four columns.
    __device__ void finish_chunk(int chunk, int vector, Sum& sum) const {
        const float scale = scale_of(chunk, sum.top, sum.total);
        float4 value = {0.f, 0.f, 0.f, 0.f};
        add_weighted(value, sum.value, scale);
        store(chunk, vector, value, Result::lse_of(sum.top, sum.total));
    }

    // What a chunk's sum is multiplied with; notes its row's LSE.
    __device__ float scale_of(int chunk, float top, float total) const {
        if (chunk >= work.num_chunks()) return 0.f;
        const int row = work.row_of_chunk(chunk);
        if (chunk == row * work.chunks_per_row()) result.note_lse(row, top, total);
        return result.scale_of(row, top, total);
    }

    __device__ void store(int chunk, int vector, const float4& columns, float lse_log2) const {
        if (chunk >= work.num_chunks()) return;
        const int row = work.row_of_chunk(chunk);
        const int col = (chunk - row * work.chunks_per_row()) * kColumnChunk;
        result.store(row, col + vector * kVectorColumns, columns, lse_log2);
    }

  private:
    // Each of the teams that share a chunk has summed its inputs.
    __device__ void put_down(const Sum& sum) const {
        shared.value[team][lane] = sum.value;
        if (lane == 0) {
            shared.top[team] = sum.top;
            shared.total[team] = sum.total;
        }
        barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
    }
    // All of them, of all. Neighbouring lanes have the same columns, each of another team.
    __device__ void add_up_by_lanes(int team, int vector, Sum& sum) const {
        const float top = max_of(shared.top[team], sharing_log2);
        const float weight = weight_of(shared.top[team], top);
        const auto of_all = [&](float x) { return sum_of(weight * x, sharing_log2); };
        const float4 own = shared.value[team][vector];
        sum = {{of_all(own.x), of_all(own.y), of_all(own.z), of_all(own.w)},
               top,
               of_all(shared.total[team])};
    }
    __device__ void add_up_by_teams(Sum& sum) const {
        const int first = first_chunk();
        const int other = first + (lane & (1 << sharing_log2) - 1) * side_by_side();
        const float top = max_of(shared.top[other], sharing_log2);
        const float weight = weight_of(shared.top[other], top);
        sum.begin();
        sum.top = top;
        sum.total = sum_of(weight * shared.total[other], sharing_log2);
#pragma unroll 4
        for (int i = 0; i < 1 << sharing_log2; ++i) {
            add_weighted(sum.value,
                         shared.value[first + i * side_by_side()][lane],
                         __shfl_sync(~0u, weight, i, kTeamThreads));
        }
    }
};

}  // namespace mla
