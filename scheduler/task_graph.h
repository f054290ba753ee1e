// Instructions before they have words: what each does and what it waits for.
#pragma once

#include <cstdint>
#include <vector>

#include "instructions/layout.h"

namespace mla {

struct Task {
    Opcode opcode = Opcode::kNoop;
    bool to_output = false;  // otherwise to a scratch slot of its own
    int32_t request = 0;

    // Partial: rows [row_begin, row_begin + num_rows) over KV positions [start, end).
    int32_t row_begin = 0;
    int32_t num_rows = 0;
    int32_t start = 0;
    int32_t end = 0;
    int32_t length = 0;  // of the request

    // Reduction: one token, a slice of heads and columns.
    int32_t token = 0;
    int32_t head_begin = 0;
    int32_t num_heads = 0;
    int32_t col_begin = 0;
    int32_t num_cols = 0;

    // The tasks that it reads: TaskGraph::inputs[input_begin, input_begin + num_inputs).
    int32_t input_begin = 0;
    int32_t num_inputs = 0;
};

struct TaskGraph {
    std::vector<Task> tasks;      // inputs before their readers
    std::vector<int32_t> inputs;  // indices into tasks
    int kv_sharing = 1;           // partials that read the same KV at the same time
};

}  // namespace mla
