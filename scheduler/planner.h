// From a batch to a queue.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "scheduler/batch.h"
#include "scheduler/cost_model.h"

namespace mla {

enum class Policy {
    kBalanced,  // the best of many cuts, by simulation
    kBackward,  // see backward.h
    kUnsplit,   // one piece per sequence
    kFixed,     // pieces of a given number of tiles
    // As kFixed, with reductions sliced by SliceRule::kBatchInvariant (see lower.h): of a
    // sequence's instructions, only slots, uids and places in the queue depend on the rest
    // of the batch and on the number of workers.
    kBatchInvariant,
};

struct PolicyName {
    Policy policy;
    const char* name;
};

inline constexpr PolicyName kPolicyNames[] = {
    {Policy::kBalanced, "balanced"},
    {Policy::kBackward, "backward"},
    {Policy::kUnsplit, "unsplit"},
    {Policy::kFixed, "fixed"},
    {Policy::kBatchInvariant, "batch_invariant"},
};

// Tiles per piece of Policy::kBatchInvariant, unless others are asked for.
inline constexpr int kInvariantTiles = 16;

// std::invalid_argument if it is the name of none.
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

// Clusters of so many workers, powers of two from 2 to kMaxMates, of which so many run at a time.
struct Clusters {
    int ctas;
    int count;
};

// Policy::kBalanced may share partials within `clusters`, and then use fewer workers.
// `split_tiles` is for Policy::kFixed, which needs it, and for Policy::kBatchInvariant, which
// takes 0 for kInvariantTiles. Throws std::invalid_argument naming the argument.
Plan plan(const Batch& batch,
          int num_workers,
          const CostModel& cost,
          Policy policy,
          int split_tiles,
          const std::vector<Clusters>& clusters);

}  // namespace mla
