// Tasks to the words of instructions/layout.h, and back as far as timing needs it.
#pragma once

#include <cstdint>
#include <vector>

#include "scheduler/task_graph.h"

namespace mla {

// Writes the tasks in `order` and returns the number of scratch slots. Slots count up in
// queue order, and are the uids of their writers; the other uids follow.
int serialise(const TaskGraph& graph,
              const std::vector<int32_t>& order,
              std::vector<int32_t>& words);

// The tasks of a queue, in its order, for simulate(). Trusts no word: throws
// ScheduleError for an unknown opcode and for an input that no earlier instruction
// writes. That is enough for a simulation to end; validate() proves the rest. Stops at
// the end of the queue.
TaskGraph parse_tasks(const int32_t* words,
                      int64_t num_instructions,
                      int num_heads,
                      int new_tokens);

}  // namespace mla
