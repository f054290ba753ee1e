#include "scheduler/queue_order.h"

#include <algorithm>
#include <numeric>

#include "scheduler/spread.h"
#include "scheduler/task_cost.h"

namespace mla {

int spread_workers(const Problem& problem, TaskGraph& leaves, std::vector<int32_t>& order) {
    const bool whole = std::all_of(leaves.tasks.begin(), leaves.tasks.end(), [](const Task& task) {
        return task.opcode == Opcode::kMlaPartial && task.to_output && task.num_mates <= 2 &&
               task.kv_sharing == 1;
    });
    if (!whole || problem.leaves_sms_out) return 0;
    int most_mates = 1;
    double most_tiles = 0.0;
    for (const Task& task : leaves.tasks) {
        most_mates = std::max(most_mates, task.num_mates);
        most_tiles = std::max(most_tiles, num_tiles_of_mate(task));
    }
    if (most_mates > 1 && most_tiles < kLeastTilesOfMates) return 0;

    int noops = noops_to_spread(problem.num_workers, static_cast<int>(num_instructions(leaves)));
    noops -= noops % most_mates;  // mates stay in one cluster
    Task noop;
    noop.to_output = true;  // it has no scratch slot
    const auto first = static_cast<int32_t>(leaves.tasks.size());
    leaves.tasks.insert(leaves.tasks.end(), noops, noop);
    order.insert(order.begin(), noops, 0);
    std::iota(order.begin(), order.begin() + noops, first);
    return noops;
}

Forecast forecast(const TaskGraph& graph,
                  int num_leaves,
                  const Timeline& leaves,
                  const CostModel& cost) {
    const size_t num_tasks = graph.tasks.size();
    Forecast result;
    result.begin_us.resize(num_tasks);
    result.finish_us = leaves.makespan_us;
    std::copy_n(leaves.start_us.begin(), num_leaves, result.begin_us.begin());

    std::vector<double> end_us(num_tasks);
    std::copy_n(leaves.end_us.begin(), num_leaves, end_us.begin());
    int32_t merge = kNoMerge;
    double inputs_end_us = 0.0;  // of that merge
    for (size_t task = num_leaves; task < num_tasks; ++task) {
        const Task& reduction = graph.tasks[task];
        const int num_inputs = graph.num_inputs(reduction);
        if (reduction.merge != merge) {
            merge = reduction.merge;
            inputs_end_us = 0.0;
            for (int i = 0; i < num_inputs; ++i) {
                const int32_t input = graph.input(graph.merges[merge], i);
                inputs_end_us = std::max(inputs_end_us, end_us[input]);
            }
        }
        result.begin_us[task] = inputs_end_us + cost.dependency_us;
        // The cheaper of its two costs: this is a bound as well.
        const int rows = reduction.num_rows;
        const int cols = reduction.num_cols;
        end_us[task] =
            result.begin_us[task] + std::min(reduction_us(num_inputs, rows, cols, false, cost),
                                             reduction_us(num_inputs, rows, cols, true, cost));
        result.finish_us = std::max(result.finish_us, end_us[task]);
    }
    return result;
}

std::vector<int32_t> append_reductions(const std::vector<int32_t>& leaf_order,
                                       const TaskGraph& graph,
                                       const Forecast& forecast) {
    std::vector<int32_t> order(graph.tasks.size());
    const auto reductions = std::copy(leaf_order.begin(), leaf_order.end(), order.begin());
    std::iota(reductions, order.end(), static_cast<int32_t>(leaf_order.size()));
    std::stable_sort(reductions, order.end(), [&forecast](int32_t a, int32_t b) {
        return forecast.begin_us[a] < forecast.begin_us[b];
    });
    return order;
}

}  // namespace mla
