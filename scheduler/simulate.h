// Predicts when each task runs, under the GPU's own rule: worker c begins with the
// queue's entry c, and whoever is free takes the next ticket.
#pragma once

#include <cstdint>
#include <vector>

#include "scheduler/cost_model.h"
#include "scheduler/task_graph.h"

namespace mla {

// Indexed by task, not by queue position. Tasks that are not in the queue keep
// worker -1. Times count from the launch.
struct Timeline {
    std::vector<int32_t> worker;
    std::vector<double> start_us;
    std::vector<double> end_us;
    double makespan_us = 0.0;
};

// Partials share the memory's bandwidth evenly while they stream (a fluid model);
// reductions wait for their inputs on the worker that took them. `order` lists task
// indices; every input must come before its reader.
Timeline simulate(const TaskGraph& graph,
                  const std::vector<int32_t>& order,
                  int num_workers,
                  const CostModel& cost);

// The same for a queue that begins with all of its partials and fills, no more than there
// are workers: reductions cannot delay them, so the partials keep the times of `partials`,
// a simulation without reductions.
Timeline simulate_reductions(const TaskGraph& graph,
                             const std::vector<int32_t>& order,
                             int num_workers,
                             const CostModel& cost,
                             const Timeline& partials);

// Every task of the graph, as it stands.
std::vector<int32_t> queue_order(const TaskGraph& graph);

}  // namespace mla
