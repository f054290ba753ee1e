// The order of the queue: where no-ops go, and where the reductions go among the tasks that wait
// for nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "scheduler/cost_model.h"
#include "scheduler/problem.h"
#include "scheduler/simulate.h"
#include "scheduler/task_graph.h"

namespace mla {

// Puts no-ops before a queue of whole sequences, if that is what spread.h asks for. Returns how
// many.
int spread_workers(const Problem& problem, TaskGraph& leaves, std::vector<int32_t>& order);

// When each task could begin if reductions never lacked a worker.
struct Forecast {
    std::vector<double> begin_us;  // by task
    double finish_us = 0.0;        // no schedule of these leaves ends earlier
};

// `leaves` is the simulation of the tasks without inputs alone, which come first in the
// graph. The slices of a merge are neighbours in it.
Forecast forecast(const TaskGraph& graph,
                  int num_leaves,
                  const Timeline& leaves,
                  const CostModel& cost);

// The leaves in their order, then the reductions in the order in which their inputs are expected to
// be there: a linear extension of the dependencies. (In the midst of the streams reductions keep
// SMs from streaming: calls of many of them took 7% longer so, on an H200.)
std::vector<int32_t> append_reductions(const std::vector<int32_t>& leaf_order,
                                       const TaskGraph& graph,
                                       const Forecast& forecast);

}  // namespace mla
