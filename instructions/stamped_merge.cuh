// A merge by chunks, see chunk_teams.cuh, of stamped results, see stamp.cuh: straight from L2 into
// registers, all at once, and without a flag. For one chunk a team, and no more inputs than fit.
//
// It runs once, when everybody waits for it, so it is short.
#pragma once

#include "instructions/chunk_teams.cuh"

namespace mla {

template <class Config>
class StampedMerge {
    using State = mk::State<Config>;
    using Teams = ChunkTeams<Config>;
    using Sum = typename Teams::Sum;
    static constexpr int kTeamThreads = Teams::kTeamThreads;

    // A team's inputs, in halves of which the second may be empty. Lane i looks after the i-th.
    static constexpr int kHalf = kTeamThreads / 2;
    using Half = StampedColumns[kHalf];

    static constexpr int kTeams = Teams::kTeams;
    static_assert(fits_stamps(kTeams, kTeamThreads) && fits_stamps(1, kTeams* kTeamThreads) &&
                      !fits_stamps(kTeams + 1, 1) && !fits_stamps(kTeams, kTeamThreads + 1),
                  "the planner counts with what is_for says");

  public:
    __device__ StampedMerge(const MlaGlobals& g, const State& state, const Teams& teams)
        : g(g),
          state(state),
          work(teams.work),
          teams(teams),
          stamp(mk::launch_epoch<Config>(), teams.lane) {}

    __device__ static bool is_for(const Teams& teams) {
        return teams.work.num_chunks() <= kTeams && teams.own_inputs <= kTeamThreads;
    }

    // The team's inputs of its chunk.
    __device__ void merge(Sum& sum) const {
        Half low, high;
        const float lse_log2 = fetch(low, high);
        if (is_first_lane()) state.arrive(kInputsSeen);
        if (threadIdx.x == 0) state.record(mk::TimingWord::kComputeBegin);
        sum.begin();
        sum.top = teams.max_of(lse_log2, Teams::kTeamThreadsLog2);
        const float weight = weight_of(lse_log2, sum.top);
        sum.total = teams.sum_of(weight, Teams::kTeamThreadsLog2);
        add(sum, low, weight, 0);
        if (has_high()) add(sum, high, weight, kHalf);
    }

  private:
    const MlaGlobals& g;
    const State& state;
    const ReductionWork& work;
    const Teams& teams;
    const Stamp stamp;

    __device__ bool has_high() const { return teams.own_inputs > kHalf; }

    // Waits for the columns of the team's inputs; returns the LSE of the lane's. Hundreds of
    // threads that looked for all they want would be in the way of those who still write: a lane
    // looks for the last columns of its input, and the team asks for all when those are there.
    __device__ float fetch(Half& low, Half& high) const {
        constexpr uint32_t kTeamLanes = (1u << kTeamThreads) - 1;
        const int chunk = teams.first_chunk(), input = teams.part() * teams.own_inputs + teams.lane;
        const bool exists =
            chunk < work.num_chunks() && teams.lane < teams.own_inputs && input < work.num_inputs;
        const int slot = exists ? work.slot(input) : 0;
        const uint32_t place = exists ? place_of(slot, chunk) : 0;
        const auto* scratch = reinterpret_cast<const StampedColumns*>(g.o_scratch);
        asm("" : "+l"(scratch));  // looked up once
        const auto* own = scratch + static_cast<uint64_t>(place) * kTeamThreads;
        const int first_lane = static_cast<int>(threadIdx.x % mk::kWarpThreads) & -kTeamThreads;
        const uint32_t inputs = __ballot_sync(~0u, exists) >> first_lane & kTeamLanes;

        bool waits = exists;
        uint32_t not_asked = inputs;
        float lse_log2 = -INFINITY;
        int seen = 0;
        state.keep_looking(slot, seen, [&] {
            if (waits) waits = !read_lse(own, lse_log2, seen);
            const uint32_t waiting = __ballot_sync(~0u, waits) >> first_lane;
            const uint32_t come = not_asked & ~waiting;
            not_asked &= waiting;
            ask_for(low, 0, scratch, place, come);
            if (has_high()) ask_for(high, kHalf, scratch, place, come);
            if (not_asked != 0) return true;
            not_asked = unstamped_of(low) & inputs;
            if (has_high()) not_asked |= unstamped_of(high) << kHalf & inputs;
            return not_asked != 0;
        });
        return lse_log2;
    }

    // Where in scratch a chunk is, by chunks.
    __device__ uint32_t place_of(int slot, int chunk) const {
        const int row = work.row_of_chunk(chunk), col = chunk - row * work.chunks_per_row();
        return static_cast<uint32_t>(g.scratch_row(slot, work.first_row + row)) *
                   (kLatentDim / kColumnChunk) +
               work.col_begin / kColumnChunk + col;
    }

    // The row's LSE, from a chunk's last columns. False: they are not there.
    __device__ bool read_lse(const StampedColumns* chunk, float& lse_log2, int& seen) const {
        uint32_t bits = 0;
        bool here = true;
#pragma unroll
        for (int i = 0; i < Stamp::kLseParts; ++i) {
            const StampedColumns columns =
                mk::ptx::load_relaxed_gpu_16_bytes(chunk + kTeamThreads - Stamp::kLseParts + i);
            here &= stamp.is_on(columns);
            bits |= Stamp::lse_bits(columns, i);
            if (i == 0) seen = Stamp::epoch_of(columns);
        }
        if (here) lse_log2 = __uint_as_float(bits);
        return here;
    }

    // This thread's columns of those inputs that have come.
    __device__ void ask_for(Half& columns,
                            int first,
                            const StampedColumns* scratch,
                            uint32_t place,
                            uint32_t come) const {
        const StampedColumns* own = scratch + teams.lane;
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            const uint64_t of_input = __shfl_sync(~0u, place, first + i, kTeamThreads);
            if (come >> first + i & 1) {
                columns[i] = mk::ptx::load_relaxed_gpu_16_bytes(own + of_input * kTeamThreads);
            }
        }
    }
    __device__ uint32_t unstamped_of(const Half& columns) const {
        uint32_t unstamped = 0;
#pragma unroll
        for (int i = 0; i < kHalf; ++i) unstamped |= stamp.is_on(columns[i]) ? 0 : 1u << i;
        return unstamped;
    }

    __device__ static void add(Sum& sum, const Half& columns, float weight, int first) {
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            const float own = __shfl_sync(~0u, weight, first + i, kTeamThreads);
            add_weighted(sum.value, Stamp::values(columns[i]), own);
        }
    }
};

}  // namespace mla
