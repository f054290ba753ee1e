#include "scheduler/queue_order.h"

#include <algorithm>
#include <numeric>

#include "scheduler/task_cost.h"

namespace mla {

Forecast forecast(const TaskGraph& graph,
                  int num_partials,
                  const Timeline& partials,
                  const CostModel& cost) {
    const size_t num_tasks = graph.tasks.size();
    Forecast result;
    result.begin_us.resize(num_tasks);
    result.finish_us = partials.makespan_us;
    std::copy_n(partials.start_us.begin(), num_partials, result.begin_us.begin());

    std::vector<double> end_us(num_tasks);
    std::copy_n(partials.end_us.begin(), num_partials, end_us.begin());
    for (size_t task = num_partials; task < num_tasks; ++task) {
        const Task& reduction = graph.tasks[task];
        double inputs_end_us = 0.0;
        for (int i = 0; i < reduction.num_inputs; ++i) {
            inputs_end_us =
                std::max(inputs_end_us, end_us[graph.inputs[reduction.input_begin + i]]);
        }
        result.begin_us[task] = inputs_end_us + cost.dependency_us;
        // The cheaper of its two costs: this is a bound as well.
        const double busy_us =
            std::min(reduction_us(reduction, false, cost), reduction_us(reduction, true, cost));
        end_us[task] = result.begin_us[task] + busy_us;
        result.finish_us = std::max(result.finish_us, end_us[task]);
    }
    return result;
}

std::vector<int32_t> merge_reductions(const std::vector<int32_t>& partial_order,
                                      const TaskGraph& graph,
                                      const Forecast& forecast) {
    const size_t num_partials = partial_order.size();
    std::vector<int32_t> reductions(graph.tasks.size() - num_partials);
    std::iota(reductions.begin(), reductions.end(), static_cast<int32_t>(num_partials));
    const auto begins_earlier = [&forecast](int32_t a, int32_t b) {
        return forecast.begin_us[a] < forecast.begin_us[b];
    };
    // Stable, and partials win ties: a reader never overtakes an input that costs nothing.
    std::stable_sort(reductions.begin(), reductions.end(), begins_earlier);
    std::vector<int32_t> merged(graph.tasks.size());
    std::merge(partial_order.begin(),
               partial_order.end(),
               reductions.begin(),
               reductions.end(),
               merged.begin(),
               begins_earlier);
    return merged;
}

}  // namespace mla
