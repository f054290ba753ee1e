#include "scheduler/serialiser.h"

#include <algorithm>
#include <string>
#include <unordered_map>

#include "scheduler/errors.h"
#include "scheduler/problem.h"

namespace mla {

namespace {

void write_partial(const Task& task, int32_t dst_batch, int32_t* words) {
    words[PartialWords::kDstBatch] = dst_batch;
    words[PartialWords::kQBatch] = task.request;
    words[PartialWords::kStart] = task.start;
    words[PartialWords::kEnd] = task.end;
    words[PartialWords::kLength] = task.length;
    words[PartialWords::kRowBegin] = task.row_begin;
    words[PartialWords::kNumRows] = task.num_rows;
}

void write_reduction(const Task& task,
                     int32_t dst_batch,
                     const TaskGraph& graph,
                     const std::vector<int32_t>& uids,
                     int32_t* words) {
    const ReductionShape shape{
        task.num_inputs, task.head_begin, task.num_heads, task.col_begin, task.num_cols};
    words[ReductionWords::kShape] = shape.pack();
    words[ReductionWords::kDstBatch] = dst_batch;
    words[ReductionWords::kDstSeq] = task.token;
    for (int i = 0; i < task.num_inputs; ++i) {
        words[ReductionWords::kInputs + i] = uids[graph.inputs[task.input_begin + i]];
    }
}

// Clamped: only its cost is wanted.
int32_t num_rows_of(const int32_t* partial, int num_heads, int new_tokens) {
    const int64_t stated = partial[PartialWords::kNumRows];
    const int64_t all = int64_t{num_heads} * (int64_t{new_tokens} - partial[PartialWords::kQSeq]) -
                        partial[PartialWords::kRowBegin];
    return static_cast<int32_t>(std::clamp<int64_t>(stated == 0 ? all : stated, 0, kMaxRows));
}

}  // namespace

int serialise(const TaskGraph& graph,
              const std::vector<int32_t>& order,
              std::vector<int32_t>& words) {
    int32_t num_slots = 0;
    for (const int32_t index : order) num_slots += !graph.tasks[index].to_output;

    words.assign(order.size() * kInstructionWords, 0);
    std::vector<int32_t> uids(graph.tasks.size());
    int32_t next_slot = 0;
    int32_t next_other = num_slots;
    for (size_t i = 0; i < order.size(); ++i) {
        const Task& task = graph.tasks[order[i]];
        const int32_t uid = task.to_output ? next_other++ : next_slot++;
        const int32_t dst_batch = task.to_output ? task.request : -uid - 1;
        uids[order[i]] = uid;

        int32_t* instruction = words.data() + i * kInstructionWords;
        instruction[kWordOpcode] = static_cast<int32_t>(task.opcode);
        instruction[kWordUid] = uid;
        if (task.opcode == Opcode::kMlaPartial) {
            write_partial(task, dst_batch, instruction);
        } else {
            write_reduction(task, dst_batch, graph, uids, instruction);
        }
    }
    return num_slots;
}

TaskGraph parse_tasks(const int32_t* words,
                      int64_t num_instructions,
                      int num_heads,
                      int new_tokens) {
    TaskGraph graph;
    graph.kv_sharing = num_row_groups(num_heads, new_tokens);
    std::unordered_map<int32_t, int32_t> task_of_uid;
    for (int64_t i = 0; i < num_instructions; ++i) {
        const int32_t* instruction = words + i * kInstructionWords;
        const auto fail = [&](const std::string& problem) {
            throw ScheduleError("instruction " + std::to_string(i) + ", uid " +
                                std::to_string(instruction[kWordUid]) + ": " + problem);
        };
        Task task;
        task.opcode = static_cast<Opcode>(instruction[kWordOpcode]);
        if (task.opcode == Opcode::kEndOfQueue) break;
        if (task.opcode == Opcode::kMlaPartial) {
            task.start = instruction[PartialWords::kStart];
            task.end = instruction[PartialWords::kEnd];
            task.to_output = instruction[PartialWords::kDstBatch] >= 0;
            task.num_rows = num_rows_of(instruction, num_heads, new_tokens);
        } else if (task.opcode == Opcode::kMlaReduction) {
            const auto shape = ReductionShape::unpack(instruction[ReductionWords::kShape]);
            if (shape.num_inputs > kMaxReductionInputs) {
                fail(std::to_string(shape.num_inputs) + " inputs, a reduction holds " +
                     std::to_string(kMaxReductionInputs) + " (rule: input-count)");
            }
            task.num_heads = shape.num_heads == 0 ? num_heads : shape.num_heads;
            task.num_cols = shape.num_cols == 0 ? kLatentDim : shape.num_cols;
            task.num_inputs = shape.num_inputs;
            task.input_begin = static_cast<int32_t>(graph.inputs.size());
            for (int input = 0; input < shape.num_inputs; ++input) {
                const int32_t uid = instruction[ReductionWords::kInputs + input];
                const auto writer = task_of_uid.find(uid);
                if (writer == task_of_uid.end()) {
                    fail("no earlier instruction writes input " + std::to_string(uid) +
                         " (rule: order)");
                }
                graph.inputs.push_back(writer->second);
            }
        } else if (task.opcode != Opcode::kNoop) {
            fail("unknown opcode " + std::to_string(instruction[kWordOpcode]) + " (rule: opcode)");
        }
        if (task.opcode != Opcode::kNoop) {
            task_of_uid[instruction[kWordUid]] = static_cast<int32_t>(graph.tasks.size());
        }
        graph.tasks.push_back(task);
    }
    return graph;
}

}  // namespace mla
