// Where the reductions go in a queue of partials.
#pragma once

#include <cstdint>
#include <vector>

#include "scheduler/cost_model.h"
#include "scheduler/simulate.h"
#include "scheduler/task_graph.h"

namespace mla {

// When each task could begin if reductions never lacked a worker.
struct Forecast {
    std::vector<double> begin_us;  // by task
    double finish_us = 0.0;        // no schedule of these partials ends earlier
};

// `partials` is the simulation of the partials alone, which come first in the graph.
Forecast forecast(const TaskGraph& graph,
                  int num_partials,
                  const Timeline& partials,
                  const CostModel& cost);

// The partials in their order, each reduction where its inputs are expected to be there.
// A linear extension of the dependencies.
std::vector<int32_t> merge_reductions(const std::vector<int32_t>& partial_order,
                                      const TaskGraph& graph,
                                      const Forecast& forecast);

}  // namespace mla
