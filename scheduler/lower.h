// From a cut to tasks.
#pragma once

#include <cstdint>
#include <vector>

#include "scheduler/cost_model.h"
#include "scheduler/cut.h"
#include "scheduler/problem.h"
#include "scheduler/task_graph.h"

namespace mla {

// How reductions are sliced by heads and columns, so that many SMs share them.
struct SliceOptions {
    bool whole = false;  // one reduction per token and row group, as wide as it can be
    int log2_scale = 0;  // more (or fewer) slices than the cost model asks for
};

// The partials of every piece; row groups of a piece are neighbours.
TaskGraph lower_partials(const Problem& problem, const Cut& cut);

// Those tasks as the cut wants them to start.
std::vector<int32_t> partial_order(const Problem& problem, const Cut& cut);

// Appends the reductions to a graph of lower_partials().
void lower_reductions(const Problem& problem,
                      const CostModel& cost,
                      const Cut& cut,
                      const SliceOptions& slices,
                      TaskGraph& graph);

}  // namespace mla
