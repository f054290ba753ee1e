#include "scheduler/serialiser.h"

#include <algorithm>
#include <limits>
#include <string>
#include <unordered_map>

#include "scheduler/batch.h"
#include "scheduler/errors.h"

namespace mla {

namespace {

// Of mates, each has nearly as many tiles as any other.
int32_t first_position(const Task& task, int mate) {
    const int64_t tiles = (int64_t{task.end} - task.start + kKvTile - 1) / kKvTile;
    const int64_t tile = tiles * mate / task.num_mates;
    return static_cast<int32_t>(std::min<int64_t>(task.end, task.start + tile * kKvTile));
}

void write_partial(const Task& task,
                   int mate,
                   int32_t dst_batch,
                   const std::vector<int32_t>& uids,
                   int32_t* words) {
    words[PartialWords::kDstBatch] = dst_batch;
    words[PartialWords::kQBatch] = task.sequence;
    words[PartialWords::kStart] = first_position(task, mate);
    words[PartialWords::kEnd] = first_position(task, mate + 1);
    if (task.num_mates > 1) {
        words[PartialWords::kNumMates] = task.num_mates;
        words[PartialWords::kMate] = mate;
    }
    if (task.adopted != kNoTask) words[PartialWords::kAdopted] = 1 + uids[task.adopted];
    words[PartialWords::kLength] = task.length;
    words[PartialWords::kRowBegin] = task.row_begin;
    words[PartialWords::kNumRows] = task.num_rows;
}

// Tasks between those of a run are of the same sequence and write scratch as well, so a run
// of tasks is a run of slots, with the same step. Its rows count from token 0, head 0.
void write_run(const Task& task,
               int32_t dst_batch,
               const Merge& run,
               const std::vector<int32_t>& uids,
               int32_t* words) {
    const ReductionShape shape{1, 0, task.num_rows, task.col_begin, task.num_cols, true};
    words[ReductionWords::kShape] = shape.pack();
    words[ReductionWords::kDstBatch] = dst_batch;
    words[ReductionWords::kRunFirst] = uids[run.first];
    words[ReductionWords::kRunCount] = run.num_inputs;
    words[ReductionWords::kRunStep] = run.step;
    words[ReductionWords::kRunRowOffset] = task.row_begin;
}

void write_list(const Task& task,
                int32_t dst_batch,
                const TaskGraph& graph,
                int num_heads,
                const std::vector<int32_t>& uids,
                int32_t* words) {
    const Merge& merge = graph.merges[task.merge];
    const int head_begin = task.row_begin % num_heads;
    const ReductionShape shape{
        merge.num_inputs, head_begin, task.num_rows, task.col_begin, task.num_cols, false};
    words[ReductionWords::kShape] = shape.pack();
    words[ReductionWords::kDstBatch] = dst_batch;
    words[ReductionWords::kDstSeq] = task.row_begin / num_heads;
    for (int i = 0; i < merge.num_inputs; ++i) {
        words[ReductionWords::kInputs + i] = uids[graph.input(merge, i)];
    }
}

class Parser {
  public:
    Parser(int num_heads, const NewTokens& new_tokens, int group_rows)
        : num_heads_(num_heads), new_tokens_(new_tokens), group_rows_(group_rows) {}

    // False at the end of the queue.
    bool parse(const int32_t* words, int64_t index) {
        words_ = words;
        index_ = index;
        Task task;
        task.opcode = static_cast<Opcode>(words[kWordOpcode]);
        switch (task.opcode) {
            case Opcode::kEndOfQueue:
                return false;
            case Opcode::kNoop:
                break;
            case Opcode::kMlaPartial:
                parse_partial(task);
                break;
            case Opcode::kMlaReduction:
                parse_reduction(task);
                break;
            case Opcode::kMlaFill:
                parse_fill(task);
                break;
            default:
                fail("unknown opcode " + std::to_string(words[kWordOpcode]) + " (rule: opcode)");
        }
        // Mates are one task, the first one's.
        if (task.opcode == Opcode::kMlaPartial && words[PartialWords::kMate] > 0) {
            if (graph_.tasks.empty() || graph_.tasks.back().opcode != task.opcode) {
                fail("mate " + std::to_string(words[PartialWords::kMate]) +
                     " does not follow the first one (rule: mates)");
            }
            ++graph_.tasks.back().num_mates;
            graph_.tasks.back().end = task.end;
            return true;
        }
        if (task.opcode != Opcode::kNoop) {
            task_of_uid_[words[kWordUid]] = static_cast<int32_t>(graph_.tasks.size());
        }
        graph_.tasks.push_back(task);
        return true;
    }

    TaskGraph take_graph() { return std::move(graph_); }

  private:
    [[noreturn]] void fail(const std::string& problem) const {
        throw ScheduleError("instruction " + std::to_string(index_) + ", uid " +
                            std::to_string(words_[kWordUid]) + ": " + problem);
    }

    void parse_partial(Task& task) const {
        task.start = words_[PartialWords::kStart];
        task.end = words_[PartialWords::kEnd];
        task.to_output = words_[PartialWords::kDstBatch] >= 0;
        const int new_tokens = tokens_of(words_[PartialWords::kQBatch]);
        task.kv_sharing = std::max(1, ceil_div(num_heads_ * new_tokens, group_rows_));
        // Clamped: only its cost is wanted.
        const int64_t stated = words_[PartialWords::kNumRows];
        const int64_t left =
            int64_t{num_heads_} * (int64_t{new_tokens} - words_[PartialWords::kQSeq]) -
            words_[PartialWords::kRowBegin];
        task.num_rows =
            static_cast<int32_t>(std::clamp<int64_t>(stated == 0 ? left : stated, 0, group_rows_));
        const int32_t adopted = words_[PartialWords::kAdopted];
        if (adopted != 0) task.adopted = writer_of(int64_t{adopted} - 1);
    }

    int tokens_of(int32_t sequence) const {
        if (new_tokens_.each.empty()) return new_tokens_.uniform;
        const auto count = static_cast<int64_t>(new_tokens_.each.size());
        if (sequence < 0 || sequence >= count) {
            fail("q_batch " + std::to_string(sequence) + " is outside [0, " +
                 std::to_string(count) + ") (rule: request)");
        }
        return new_tokens_.each[sequence];
    }

    void parse_reduction(Task& task) {
        const auto shape = ReductionShape::unpack(words_[ReductionWords::kShape]);
        task.num_rows =
            shape.num_rows == 0 ? std::max(0, num_heads_ - shape.head_begin) : shape.num_rows;
        task.num_cols = shape.num_cols == 0 ? kLatentDim - shape.col_begin : shape.num_cols;
        task.merge = shape.is_run ? merge_of_run() : merge_of_list(shape.num_listed);
    }

    int32_t merge_of_list(int num_inputs) {
        if (num_inputs > kMaxReductionInputs) {
            fail(std::to_string(num_inputs) + " inputs, a list holds " +
                 std::to_string(kMaxReductionInputs) + " (rule: input-count)");
        }
        const auto first = static_cast<int32_t>(graph_.inputs.size());
        for (int i = 0; i < num_inputs; ++i) add_input(words_[ReductionWords::kInputs + i]);
        return add_merge(first, num_inputs);
    }

    int32_t merge_of_run() {
        const Run run{words_[ReductionWords::kRunFirst],
                      words_[ReductionWords::kRunCount],
                      words_[ReductionWords::kRunStep]};
        if (run.num_inputs < 1 || run.num_inputs > kMaxRunInputs) {
            fail(std::to_string(run.num_inputs) + " inputs, a run holds 1 to " +
                 std::to_string(kMaxRunInputs) + " (rule: input-count)");
        }
        // Slices of one merge usually follow each other.
        if (run == last_run_) return last_run_merge_;
        const auto first = static_cast<int32_t>(graph_.inputs.size());
        for (int64_t i = 0; i < run.num_inputs; ++i) add_input(run.first + i * run.step);
        last_run_ = run;
        last_run_merge_ = add_merge(first, run.num_inputs);
        return last_run_merge_;
    }

    int32_t writer_of(int64_t uid) const {
        const auto writer = task_of_uid_.find(uid);
        if (writer == task_of_uid_.end()) {
            fail("no earlier instruction writes input " + std::to_string(uid) + " (rule: order)");
        }
        return writer->second;
    }

    void add_input(int64_t uid) {
        const int32_t writer = writer_of(uid);
        if (graph_.inputs.size() == std::numeric_limits<int32_t>::max()) {
            fail("too many inputs in all (rule: input-count)");
        }
        graph_.inputs.push_back(writer);
    }

    int32_t add_merge(int32_t first, int num_inputs) {
        graph_.merges.push_back({first, num_inputs, 0});
        return static_cast<int32_t>(graph_.merges.size()) - 1;
    }

    void parse_fill(Task& task) const {
        task.to_output = true;
        const int64_t tokens =
            int64_t{words_[FillWords::kTokenEnd]} - words_[FillWords::kTokenBegin];
        task.num_rows = static_cast<int32_t>(
            std::clamp<int64_t>(tokens * num_heads_, 0, std::numeric_limits<int32_t>::max()));
    }

    struct Run {
        int32_t first;
        int32_t num_inputs;
        int32_t step;
        bool operator==(const Run& other) const {
            return first == other.first && num_inputs == other.num_inputs && step == other.step;
        }
    };

    const int num_heads_;
    const NewTokens& new_tokens_;
    const int group_rows_;
    const int32_t* words_ = nullptr;  // of the instruction in hand
    int64_t index_ = 0;
    TaskGraph graph_;
    std::unordered_map<int64_t, int32_t> task_of_uid_;
    Run last_run_{0, 0, 0};
    int32_t last_run_merge_ = kNoMerge;
};

}  // namespace

int serialise(const TaskGraph& graph,
              const std::vector<int32_t>& order,
              int num_heads,
              std::vector<int32_t>& words) {
    std::vector<int32_t> uids(graph.tasks.size());
    int32_t num_slots = 0;
    for (size_t i = 0; i < graph.tasks.size(); ++i) {
        if (!graph.tasks[i].to_output) uids[i] = num_slots++;
    }
    int32_t next_other = num_slots;
    for (const int32_t index : order) {
        if (graph.tasks[index].to_output) uids[index] = next_other++;
    }

    words.assign(num_instructions(graph) * kInstructionWords, 0);
    int32_t* instruction = words.data();
    for (const int32_t index : order) {
        const Task& task = graph.tasks[index];
        const int32_t uid = uids[index];
        const int32_t dst_batch = task.to_output ? task.sequence : -uid - 1;
        if (task.opcode == Opcode::kMlaPartial) {
            for (int mate = 0; mate < task.num_mates; ++mate, instruction += kInstructionWords) {
                instruction[kWordOpcode] = static_cast<int32_t>(task.opcode);
                instruction[kWordUid] = mate == 0 ? uid : next_other++;
                write_partial(task, mate, dst_batch, uids, instruction);
            }
            continue;
        }
        instruction[kWordOpcode] = static_cast<int32_t>(task.opcode);
        instruction[kWordUid] = uid;
        if (task.opcode == Opcode::kNoop) {
            // Nothing but its opcode and uid.
        } else if (task.opcode == Opcode::kMlaFill) {
            instruction[FillWords::kTokenBegin] = task.token_begin;
            instruction[FillWords::kTokenEnd] = task.token_end;
        } else if (graph.merges[task.merge].step > 0) {
            write_run(task, dst_batch, graph.merges[task.merge], uids, instruction);
        } else {
            write_list(task, dst_batch, graph, num_heads, uids, instruction);
        }
        instruction += kInstructionWords;
    }
    return num_slots;
}

TaskGraph parse_tasks(const int32_t* words,
                      int64_t num_instructions,
                      int num_heads,
                      const NewTokens& new_tokens,
                      int group_rows) {
    Parser parser(num_heads, new_tokens, group_rows);
    for (int64_t i = 0; i < num_instructions; ++i) {
        if (!parser.parse(words + i * kInstructionWords, i)) break;
    }
    return parser.take_graph();
}

}  // namespace mla
