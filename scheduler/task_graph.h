// Instructions before they have words: what each does and what it waits for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "instructions/layout.h"

namespace mla {

inline constexpr int32_t kNoMerge = -1;
inline constexpr int32_t kNoTask = -1;

struct Task {
    Opcode opcode = Opcode::kNoop;
    bool to_output = false;  // otherwise to a scratch slot of its own
    int32_t sequence = 0;    // in the batch

    // Rows of the sequence, all in one row group. A fill only counts them.
    int32_t row_begin = 0;
    int32_t num_rows = 0;

    // Partial: KV positions [start, end).
    int32_t start = 0;
    int32_t end = 0;
    int32_t length = 0;         // of the sequence
    int32_t kv_sharing = 1;     // row groups of the sequence: partials that read the same KV
    int32_t num_mates = 1;      // workers of a cluster that share it, each with an instruction
    int32_t adopted = kNoTask;  // partial whose result joins this one's

    // Reduction: a slice of columns, and what is merged.
    int32_t col_begin = 0;
    int32_t num_cols = 0;
    int32_t merge = kNoMerge;  // in TaskGraph::merges

    // Fill: flat tokens.
    int32_t token_begin = 0;
    int32_t token_end = 0;
};

// What the slices of one reduction read: tasks first, first + step, ..., or, with step 0,
// those that TaskGraph::inputs lists from `first` on.
struct Merge {
    int32_t first = 0;
    int32_t num_inputs = 0;
    int32_t step = 0;
};

struct TaskGraph {
    std::vector<Task> tasks;  // inputs before their readers
    std::vector<Merge> merges;
    std::vector<int32_t> inputs;  // indices into tasks

    int32_t input(const Merge& merge, int i) const {
        return merge.step == 0 ? inputs[merge.first + i] : merge.first + i * merge.step;
    }
    int num_inputs(const Task& reduction) const { return merges[reduction.merge].num_inputs; }
};

// One for each task, but for mates.
inline size_t num_instructions(const TaskGraph& graph) {
    size_t count = 0;
    for (const Task& task : graph.tasks) count += task.num_mates;
    return count;
}

}  // namespace mla
