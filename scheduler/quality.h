// The measure by which backward scheduling grows a reduction tree.
#pragma once

#include <vector>

#include "scheduler/cost_model.h"

namespace mla {

inline constexpr double kHopelessQuality = -999999999.0;

// Times count back from the finish, which is 0: the earlier, the more negative.
//
// `num_processors` processors compute the partials of one sequence, one each. They feed
// next_times.size() reductions per new token; reduction i expects its next input at
// next_times[i], and each further one (working backwards) `input_us` earlier. Every
// partial takes the latest time that is still free among all reductions:
//
//     due(0) >= due(1) >= ... >= due(num_processors - 1)
//
// A partial of w tiles that is due at d starts at
//
//     d - dependency_us - partial_fixed_us - w * tile_us(num_processors)
//
// The ceil(seq_length / 64) tiles are dealt out so that the earliest of these starts is
// as late as can be. That start is the result: higher is better, and adding a constant
// to all next_times adds it to the result. More reductions than processors: the result
// is kHopelessQuality, for the processors that reduce are those that compute.
//
// Throws std::invalid_argument for empty or non-finite next_times and for counts below 1.
double quality(const std::vector<double>& next_times,
               int num_processors,
               int num_tokens,
               int seq_length,
               const CostModel& cost,
               double input_us);

// Reading one input of `num_heads` heads, unsliced.
double whole_input_us(int num_heads, const CostModel& cost);

// The heads that __get_quality__ assumes: it is not told.
inline constexpr int kQualityHeads = 16;

// Deals `num_tiles` tiles to workers that must be done (stored and seen) at due_us, so
// that the earliest start is as late as can be. Returns that start; fills `tiles`, one
// entry per worker, where 0 means that it is not used.
double deal_tiles(const std::vector<double>& due_us,
                  int num_tiles,
                  double fixed_us,
                  double tile_us,
                  std::vector<int>& tiles);

}  // namespace mla
