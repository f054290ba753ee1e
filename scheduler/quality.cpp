#include "scheduler/quality.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

#include "scheduler/problem.h"
#include "scheduler/task_cost.h"

namespace mla {

namespace {

void check_positive(const char* name, int value) {
    if (value >= 1) return;
    throw std::invalid_argument(std::string(name) + ": expected at least 1, got " +
                                std::to_string(value));
}

// The latest start for which the workers hold `num_tiles` tiles if tiles could be cut.
double fractional_start_us(std::vector<double> latest_us, double work_us) {
    std::sort(latest_us.begin(), latest_us.end(), std::greater<>());
    // With the first n workers in use, n * start = sum(latest) - work.
    double sum_us = 0.0;
    for (size_t n = 1;; ++n) {
        sum_us += latest_us[n - 1];
        const double start_us = (sum_us - work_us) / static_cast<double>(n);
        if (n == latest_us.size() || start_us >= latest_us[n]) return start_us;
    }
}

}  // namespace

double deal_tiles(const std::vector<double>& due_us,
                  int num_tiles,
                  double fixed_us,
                  double tile_us,
                  std::vector<int>& tiles) {
    // Start of a partial without tiles; counted from the last one, for precision.
    const double origin_us = *std::max_element(due_us.begin(), due_us.end()) - fixed_us;
    std::vector<double> latest_us(due_us);
    for (double& latest : latest_us) latest -= fixed_us + origin_us;
    const double start_us = fractional_start_us(latest_us, num_tiles * tile_us);

    // Whole tiles that fit after that start; the rest, at most one per worker, goes
    // where it moves the start least.
    tiles.assign(due_us.size(), 0);
    int left = num_tiles;
    for (size_t i = 0; i < due_us.size(); ++i) {
        const double fitting = (latest_us[i] - start_us) / tile_us;
        tiles[i] = static_cast<int>(std::clamp(fitting, 0.0, static_cast<double>(left)));
        left -= tiles[i];
    }
    std::vector<std::pair<double, size_t>> after_one_more;  // a heap, the latest start on top
    for (size_t i = 0; i < due_us.size(); ++i) {
        after_one_more.emplace_back(latest_us[i] - (tiles[i] + 1) * tile_us, i);
    }
    std::make_heap(after_one_more.begin(), after_one_more.end());
    for (; left > 0; --left) {
        std::pop_heap(after_one_more.begin(), after_one_more.end());
        auto& [next_us, worker] = after_one_more.back();
        ++tiles[worker];
        next_us -= tile_us;
        std::push_heap(after_one_more.begin(), after_one_more.end());
    }

    double earliest_us = std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < due_us.size(); ++i) {
        if (tiles[i] > 0) earliest_us = std::min(earliest_us, latest_us[i] - tiles[i] * tile_us);
    }
    return origin_us + earliest_us;
}

double whole_input_us(int num_heads, const CostModel& cost) {
    return cost.reduction_kib_us * num_heads * kLatentDim * sizeof(float) / kBytesPerKib;
}

double quality(const std::vector<double>& next_times,
               int num_processors,
               int num_tokens,
               int seq_length,
               const CostModel& cost,
               double input_us) {
    check_range("num_processors", num_processors, 1, kMaxWorkers);
    check_positive("num_tokens", num_tokens);
    check_positive("seq_length", seq_length);
    if (next_times.empty()) {
        throw std::invalid_argument("next_times: expected at least one reduction, got none");
    }
    for (const double time : next_times) {
        if (!std::isfinite(time)) {
            throw std::invalid_argument("next_times: expected finite times");
        }
    }
    if (static_cast<int64_t>(next_times.size()) > num_processors / num_tokens) {
        return kHopelessQuality;
    }

    std::vector<double> free_us(next_times);
    std::make_heap(free_us.begin(), free_us.end());
    std::vector<double> due_us(num_processors);
    for (double& due : due_us) {
        std::pop_heap(free_us.begin(), free_us.end());
        due = free_us.back();
        free_us.back() -= input_us;
        std::push_heap(free_us.begin(), free_us.end());
    }
    std::vector<int> tiles;
    return deal_tiles(due_us,
                      ceil_div(seq_length, kKvTile),
                      cost.partial_fixed_us + cost.dependency_us,
                      cost.tile_us(num_processors, 1),
                      tiles);
}

}  // namespace mla
