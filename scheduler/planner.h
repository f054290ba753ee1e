// From a batch to a queue.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "scheduler/cost_model.h"
#include "scheduler/problem.h"

namespace mla {

enum class Policy {
    kBalanced,  // the best of many cuts, by simulation
    kBackward,  // see backward.h
    kUnsplit,   // one piece per request
    kFixed,     // pieces of a given number of tiles
};

// "balanced", "backward", "unsplit" or "fixed"; otherwise std::invalid_argument.
Policy parse_policy(const std::string& name);

struct Plan {
    std::vector<int32_t> words;  // kInstructionWords per instruction; no end-of-queue
    int num_slots = 0;           // scratch slots that the queue writes
    int num_workers = 0;
    // Predictions, by queue position, in microseconds from the launch.
    double predicted_us = 0.0;
    std::vector<int32_t> worker;
    std::vector<double> start_us;
    std::vector<double> end_us;

    int num_instructions() const { return static_cast<int>(words.size()) / kInstructionWords; }
};

// `split_tiles` is for Policy::kFixed alone, which needs it. Throws std::invalid_argument
// naming the argument.
Plan plan(const Problem& problem, const CostModel& cost, Policy policy, int split_tiles);

}  // namespace mla
