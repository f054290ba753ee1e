// A device plan's problem as Python passes it, for both extension modules.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "scheduler/cost_model.h"
#include "scheduler/device_plan.h"
#include "scheduler/problem.h"

namespace mla {

// `values` in the order of kCostFields, microseconds.
inline DevicePlanCost device_plan_cost(const std::vector<double>& values) {
    CostModel model;
    if (values.size() != std::size(kCostFields)) {
        throw std::invalid_argument("cost: expected " + std::to_string(std::size(kCostFields)) +
                                    " numbers, got " + std::to_string(values.size()));
    }
    for (size_t i = 0; i < values.size(); ++i) model.*kCostFields[i].value = values[i];
    check_cost_model(model);
    const auto scaled = [](double us, double scale) {
        const double value = std::min(us * scale + 0.5, double{device_plan::kMaxCost});
        return static_cast<uint32_t>(value);
    };
    const auto ns = [&](double us) { return scaled(us, 1e3); };
    const auto ns_1024 = [&](double us) { return scaled(us, 1024e3); };
    constexpr double kRowKib = 2;  // of O, in fp32
    constexpr double kOutputRowKib = 1;
    DevicePlanCost cost{};
    cost.partial_next = ns(model.partial_next_us);
    cost.tile_compute = ns(model.partial_tile_compute_us);
    cost.reduction_fixed = ns(model.reduction_fixed_us);
    cost.dependency = ns(model.dependency_us);
    cost.tile_1024 = ns_1024(model.partial_tile_us);
    cost.tile_contention_1024 = ns_1024(model.partial_tile_contention_us);
    cost.reduction_row_1024 = ns_1024(model.reduction_kib_us * kRowKib);
    cost.mates_fixed = ns(model.mates_fixed_us);
    cost.mates_row_1024 = ns_1024(model.mates_kib_us * kRowKib);
    cost.store_row_1024 = ns_1024(model.partial_store_kib_us * kOutputRowKib);
    return cost;
}

// Throws std::invalid_argument unless every size can be planned for.
inline void check_device_plan(const DevicePlanProblem& p) {
    check_range("num_requests", p.num_requests, 1, 1 << 16);
    check_range("num_kv_heads", p.num_kv_heads, 1, kMaxHeads);
    check_range("num_heads", p.num_heads, 1, kMaxHeads);
    check_range("s_q", p.s_q, 1, kMaxNewTokens);
    check_range("total_tokens", p.total_tokens, 0, 1 << 24);
    check_range("max_seq_len", p.max_seq_len, 0, INT32_MAX - 2 * kKvTile);
    check_range("num_workers", p.num_workers, 1, kMaxWorkers);
    check_range("split_tiles", p.split_tiles, 0, 1 << 20);
    const int ctas = p.cluster_ctas;
    check_range("cluster_ctas", ctas, 1, kMaxMates);
    if ((ctas & (ctas - 1)) != 0 || p.num_workers % ctas != 0) {
        throw std::invalid_argument("cluster_ctas: expected a power of two that divides " +
                                    std::to_string(p.num_workers) + " workers, got " +
                                    std::to_string(ctas));
    }
    check_range("row groups of a request", p.max_groups(), 1, device_plan::kMaxGroups);
    const DevicePlanCapacity capacity = device_plan_capacity(p);
    check_range("instructions that a plan of these sizes may need",
                capacity.instructions,
                0,
                device_plan::kMaxInstructions);
}

// Sizes alone; throws std::invalid_argument unless they can be planned for.
inline DevicePlanProblem device_plan_problem(int num_requests,
                                             int num_kv_heads,
                                             int s_q,
                                             int total_tokens,
                                             int num_heads,
                                             int max_seq_len,
                                             int num_workers,
                                             int split_tiles,
                                             int cluster_ctas,
                                             int group_rows) {
    check_group_rows(group_rows);
    DevicePlanProblem problem{};
    while (problem.group_rows() < group_rows) ++problem.group_log2;
    problem.num_requests = num_requests;
    problem.num_kv_heads = num_kv_heads;
    problem.s_q = s_q;
    problem.total_tokens = total_tokens;
    problem.num_heads = num_heads;
    problem.max_seq_len = max_seq_len;
    problem.num_workers = num_workers;
    problem.split_tiles = split_tiles;
    problem.cluster_ctas = cluster_ctas;
    check_device_plan(problem);
    return problem;
}

}  // namespace mla
