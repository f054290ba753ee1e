// Predicts when each task runs, under the GPU's own rule: worker c begins with the
// queue's entry c, and whoever is free takes the next ticket.
#pragma once

#include <cstdint>
#include <memory>
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

class Simulation;  // in simulate.cpp

// Simulates a queue that begins with all of its partials and fills, the leaves. Reductions cannot
// delay those, so the leaves are simulated once, and each choice of reductions behind them only
// from there on where the last leaf has its worker.
class LeafSimulation {
  public:
    LeafSimulation(const TaskGraph& leaves,
                   const std::vector<int32_t>& order,
                   int num_workers,
                   const CostModel& cost);

    // Without reductions.
    const Timeline& timeline() const { return timeline_; }

    // `graph` and `order` begin with the leaves and their order. Leaves that are no more than the
    // workers keep the times of timeline(), without another look at their streams; then
    // `num_workers` may be any that suffice, otherwise it is the constructor's.
    Timeline with_reductions(const TaskGraph& graph,
                             const std::vector<int32_t>& order,
                             int num_workers) const;

  private:
    std::shared_ptr<const Simulation> handed_out_;  // every leaf, and not yet ended
    Timeline timeline_;
};

// Every task of the graph, as it stands.
std::vector<int32_t> queue_order(const TaskGraph& graph);

}  // namespace mla
