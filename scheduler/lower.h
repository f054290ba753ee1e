// From a cut to tasks.
#pragma once

#include <cstdint>
#include <vector>

#include "scheduler/cost_model.h"
#include "scheduler/cut.h"
#include "scheduler/problem.h"
#include "scheduler/task_graph.h"

namespace mla {

// How the reduction of a row group is sliced by rows and columns, so that many SMs share it.
enum class SliceRule {
    // As many slices as the cost model asks for, given what else is merged: a power of two, or
    // finely, thirds of powers of two as well. Each is the better one for some batches.
    kFitted,
    kFittedFinely,
    kWhole,  // one
    // As many slices as there are inputs, or the next fewer of the sequence: all rows; half
    // of them (rounded up); half of those; ... one row; its columns halved; ... 64 columns. So
    // a slice reads about what one piece wrote. Depends on the row group's rows and pieces
    // alone.
    kBatchInvariant,
};

struct SliceOptions {
    SliceRule rule = SliceRule::kFitted;
    int steps = 0;  // kFitted: finer (or coarser) than that, powers of two and thirds in turns
};

// What waits for nothing: the partials, by sequence, piece and row group; then the fills.
TaskGraph lower_leaves(const Problem& problem, const Cut& cut);

// Those tasks as the cut wants them to start. Row groups of a piece are neighbours; fills
// come last, for they are short.
std::vector<int32_t> leaf_order(const Problem& problem, const Cut& cut);

// Appends the reductions to a graph of lower_leaves().
void lower_reductions(const Problem& problem,
                      const CostModel& cost,
                      const Cut& cut,
                      const SliceOptions& slices,
                      TaskGraph& graph);

}  // namespace mla
