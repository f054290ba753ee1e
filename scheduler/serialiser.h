// Tasks to the words of instructions/layout.h, and back as far as timing needs it.
#pragma once

#include <cstdint>
#include <vector>

#include "scheduler/task_graph.h"

namespace mla {

// Writes the tasks in `order`, which must be all of them, and returns the number of scratch
// slots. Slots count up by task, so that the pieces of a row group are a run of slots, and
// are the uids of their writers; the other uids follow, in queue order.
int serialise(const TaskGraph& graph,
              const std::vector<int32_t>& order,
              int num_heads,
              std::vector<int32_t>& words);

// New tokens of each sequence, or of any.
struct NewTokens {
    std::vector<int32_t> each;  // empty: all have `uniform`
    int32_t uniform = 0;
};

// The tasks of a queue, in its order, for simulate(). Trusts no word: throws
// ScheduleError for an unknown opcode, for a sequence whose tokens are not told, and for an
// input that no earlier instruction writes. That is enough for a simulation to end;
// validate() proves the rest. Stops at the end of the queue.
TaskGraph parse_tasks(const int32_t* words,
                      int64_t num_instructions,
                      int num_heads,
                      const NewTokens& new_tokens,
                      int group_rows);

}  // namespace mla
