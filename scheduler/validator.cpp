#include "scheduler/validator.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "scheduler/errors.h"

namespace mla {

namespace {

using std::to_string;

// A set of column chunks of one row, one bit each.
using ColumnSet = uint8_t;
static_assert(kLatentDim / kColumnChunk == 8, "a ColumnSet has 8 bits");
constexpr ColumnSet kAllColumns = 0xff;

// Rows [begin, end) of a sequence, in some columns.
struct Region {
    int32_t sequence;
    int64_t row_begin;
    int64_t row_end;
    ColumnSet columns;
};

// Rows x positions that a partial attends to.
struct Rectangle {
    int64_t row_begin;
    int64_t row_end;
    int32_t start;
    int32_t end;
    int32_t uid;
};

struct Slot {
    Region region;
    size_t first_row_read;  // in Validator::columns_read_
};

[[noreturn]] void fail(const Rule& rule, const std::string& problem) {
    throw ScheduleError(problem + " (rule: " + rule.name + ")");
}

class Validator {
  public:
    Validator(const Batch& batch, int num_slots)
        : batch_(batch),
          num_heads_(batch.num_heads),
          num_slots_(num_slots),
          unfilled_(tokens_to_fill(batch)),
          rectangles_(batch.seq_lens.size()) {
        first_row_.push_back(0);
        for (int sequence = 0; sequence < batch.num_sequences(); ++sequence) {
            first_row_.push_back(first_row_.back() + num_rows(sequence));
        }
        columns_written_.resize(first_row_.back());
    }

    void run(const Queue& queue) {
        bool ended = false;
        for (index_ = 0; index_ < queue.num_instructions; ++index_) {
            words_ = queue.words + index_ * kInstructionWords;
            const auto opcode = static_cast<Opcode>(words_[kWordOpcode]);
            check(!ended || opcode == Opcode::kEndOfQueue,
                  rules::kEndOfQueue,
                  "runs behind the end of the queue");
            check_place_among_mates(opcode);
            switch (opcode) {
                case Opcode::kEndOfQueue:
                    ended = true;
                    break;
                case Opcode::kNoop:
                    break;
                case Opcode::kMlaPartial:
                    check_uid();
                    check_partial();
                    break;
                case Opcode::kMlaReduction:
                    check_uid();
                    check_reduction();
                    break;
                case Opcode::kMlaFill:
                    check_uid();
                    check_fill();
                    break;
                default:
                    check(
                        false, rules::kOpcode, "unknown opcode " + to_string(words_[kWordOpcode]));
            }
        }
        if (next_mate_ > 0) fail(rules::kMates, "the queue ends before " + next_mate_name());
        check_all_read();
        check_all_filled();
        for (int sequence = 0; sequence < batch_.num_sequences(); ++sequence) {
            check_coverage(sequence);
        }
    }

  private:
    // Messages are built only when needed: `problem` is a string or makes one.
    template <class Problem>
    void check(bool condition, const Rule& rule, const Problem& problem) const {
        if (condition) return;
        std::string text;
        if constexpr (std::is_invocable_v<Problem>) {
            text = problem();
        } else {
            text = problem;
        }
        fail(rule,
             "instruction " + to_string(index_) + ", uid " + to_string(words_[kWordUid]) + ": " +
                 text);
    }

    template <class Integer>
    void check_in(
        const Rule& rule, const char* name, Integer value, int64_t low, int64_t end) const {
        check(low <= value && value < end, rule, [&] {
            return std::string(name) + " " + to_string(value) + " is outside [" + to_string(low) +
                   ", " + to_string(end) + ")";
        });
    }

    void check_uid() {
        check(uid() >= 0, rules::kUid, "the uid is negative");
        check(uids_.insert(uid()).second, rules::kUid, "the uid was used before");
    }

    void check_reserved(int first_word) const {
        for (int word = first_word; word < kInstructionWords; ++word) {
            check(words_[word] == 0, rules::kReserved, [&] {
                return "word " + to_string(word) + " is " + to_string(words_[word]) +
                       ", expected 0";
            });
        }
    }

    // What is not shared counts as mate 0 of 0.
    void check_place_among_mates(Opcode opcode) {
        const bool is_partial = opcode == Opcode::kMlaPartial;
        const int32_t num_mates = is_partial ? words_[PartialWords::kNumMates] : 0;
        const int32_t mate = is_partial ? words_[PartialWords::kMate] : 0;
        check(num_mates == 0 || num_mates == 2 || num_mates == 4 || num_mates == kMaxMates,
              rules::kMates,
              [&] { return "num_mates is " + to_string(num_mates) + ", expected 0, 2, 4 or 8"; });
        if (next_mate_ > 0) {
            check(mate == next_mate_ && num_mates == num_mates_, rules::kMates, [&] {
                return "stands in the place of " + next_mate_name();
            });
            check_agrees_with_mate_before();
        } else {
            check(mate == 0, rules::kMates, [&] {
                return "mate is " + to_string(mate) + ", expected 0";
            });
            check(num_mates <= num_mates_, rules::kMatesFirst, [&] {
                return to_string(num_mates) + " mates stand behind " +
                       (num_mates_ == 0 ? "what is not shared" : to_string(num_mates_));
            });
            check(num_mates == 0 || index_ % num_mates == 0, rules::kMatesFirst, [&] {
                return to_string(num_mates) +
                       " mates begin at a position that is no multiple of it";
            });
        }
        if (opcode != Opcode::kNoop) num_mates_ = num_mates;
        next_mate_ = mate + 1 < num_mates ? mate + 1 : 0;
    }

    void check_agrees_with_mate_before() const {
        struct Field {
            int word;
            const char* name;
        };
        constexpr Field kShared[] = {{PartialWords::kDstBatch, "dst_batch"},
                                     {PartialWords::kDstSeq, "dst_seq"},
                                     {PartialWords::kQBatch, "q_batch"},
                                     {PartialWords::kQSeq, "q_seq"},
                                     {PartialWords::kLength, "length"},
                                     {PartialWords::kRowBegin, "row_begin"},
                                     {PartialWords::kNumRows, "num_rows"}};
        const int32_t* before = words_ - kInstructionWords;
        for (const Field& field : kShared) {
            check(words_[field.word] == before[field.word], rules::kMates, [&] {
                return std::string(field.name) + " " + to_string(words_[field.word]) +
                       " is not the " + to_string(before[field.word]) + " of the mate before";
            });
        }
        const int32_t start = words_[PartialWords::kStart];
        const int32_t end_before = before[PartialWords::kEnd];
        check(start == end_before, rules::kMates, [&] {
            return "starts at " + to_string(start) + ", the mate before ends at " +
                   to_string(end_before);
        });
    }

    void check_partial() {
        check_reserved(PartialWords::kAdopted + 1);
        const int32_t sequence = words_[PartialWords::kQBatch];
        check_in(rules::kRequest, "q_batch", sequence, 0, batch_.num_sequences());

        const int32_t token = words_[PartialWords::kQSeq];
        check_in(rules::kToken, "q_seq", token, 0, batch_.new_tokens[sequence]);
        check(words_[PartialWords::kDstSeq] == token, rules::kToken, [&] {
            return "dst_seq " + to_string(words_[PartialWords::kDstSeq]) + " is not q_seq " +
                   to_string(token);
        });

        const int64_t token_row = int64_t{token} * num_heads_;
        const int32_t row_begin = words_[PartialWords::kRowBegin];
        check_in(rules::kRows, "row_begin", row_begin, 0, num_rows(sequence) - token_row);
        const int64_t first_row = token_row + row_begin;
        check(first_row % batch_.group_rows == 0, rules::kRowGroup, [&] {
            return "the first row, " + to_string(first_row) + ", is not a multiple of " +
                   to_string(batch_.group_rows);
        });
        const int64_t group_rows =
            std::min<int64_t>(batch_.group_rows, num_rows(sequence) - first_row);
        const int32_t stated_rows = words_[PartialWords::kNumRows];
        check(stated_rows == 0 || stated_rows == group_rows, rules::kRows, [&] {
            return "num_rows is " + to_string(stated_rows) + ", the row group has " +
                   to_string(group_rows);
        });

        const int32_t length = words_[PartialWords::kLength];
        check(length == batch_.seq_lens[sequence], rules::kLength, [&] {
            return "length " + to_string(length) + " is not sequence " + to_string(sequence) +
                   "'s " + to_string(batch_.seq_lens[sequence]);
        });
        const int32_t start = words_[PartialWords::kStart];
        const int32_t end = words_[PartialWords::kEnd];
        check(0 <= start && start < end && end <= length, rules::kKvRange, [&] {
            return "[" + to_string(start) + ", " + to_string(end) + ") is not a part of [0, " +
                   to_string(length) + ")";
        });
        check(start % kKvTile == 0 && (end % kKvTile == 0 || end == length),
              rules::kKvAlignment,
              [&] {
                  return "[" + to_string(start) + ", " + to_string(end) +
                         ") is not cut at multiples of " + to_string(kKvTile);
              });

        const Region region{sequence, first_row, first_row + group_rows, kAllColumns};
        check_adopted(region);
        const int32_t dst_batch = words_[PartialWords::kDstBatch];
        if (words_[PartialWords::kMate] == 0) {
            write(dst_batch, region);
        } else {
            check(dst_batch >= 0 || uid() >= num_slots_,
                  rules::kSlot,
                  "the uid is a scratch slot, which only mate 0 may have");
        }
        rectangles_[sequence].push_back({region.row_begin, region.row_end, start, end, uid()});
    }

    // Comes before the partial's own slot is written, so that it cannot be the adopted one.
    void check_adopted(const Region& region) {
        const int32_t adopted = words_[PartialWords::kAdopted];
        if (adopted == 0) return;
        const int64_t slot = int64_t{adopted} - 1;
        check(words_[PartialWords::kNumMates] == 0, rules::kMates, [&] {
            return "adopts slot " + to_string(slot) + ", which mates cannot";
        });
        read(slot, region);
    }

    // Slots first, first + step, ..., or those that the words list.
    struct Inputs {
        bool is_run;
        int64_t count;
        int64_t first = 0;
        int64_t step = 0;
    };

    void check_reduction() {
        const auto shape = ReductionShape::unpack(words_[ReductionWords::kShape]);
        const Inputs inputs = shape.is_run ? check_run(shape) : check_list(shape);

        check(shape.head_begin < num_heads_, rules::kSlice, [&] {
            return "the first head, " + to_string(shape.head_begin) + ", is not one of " +
                   to_string(num_heads_);
        });
        const int num_cols = shape.num_cols == 0 ? kLatentDim - shape.col_begin : shape.num_cols;
        const int col_end = shape.col_begin + num_cols;
        check(col_end <= kLatentDim, rules::kSlice, [&] {
            return "columns [" + to_string(shape.col_begin) + ", " + to_string(col_end) +
                   ") are not a part of [0, " + to_string(kLatentDim) + ")";
        });

        const int32_t token = words_[ReductionWords::kDstSeq];
        check_in(rules::kToken, "dst_seq", token, 0, kMaxNewTokens);
        const int64_t row_offset = inputs.is_run ? words_[ReductionWords::kRunRowOffset] : 0;
        const int num_rows = shape.num_rows == 0 ? num_heads_ - shape.head_begin : shape.num_rows;
        Region region{};
        region.row_begin = int64_t{token} * num_heads_ + shape.head_begin + row_offset;
        region.row_end = region.row_begin + num_rows;
        region.columns = columns_of(shape.col_begin, num_cols);
        const auto group_of = [&](int64_t row) { return row / batch_.group_rows; };
        check(group_of(region.row_begin) == group_of(region.row_end - 1), rules::kRowGroup, [&] {
            return "rows [" + to_string(region.row_begin) + ", " + to_string(region.row_end) +
                   ") are of more than one row group";
        });

        region.sequence = slot_of(input(inputs, 0)).region.sequence;
        check_in(rules::kToken, "dst_seq", token, 0, batch_.new_tokens[region.sequence]);
        check(region.row_end <= this->num_rows(region.sequence), rules::kSlice, [&] {
            return "rows [" + to_string(region.row_begin) + ", " + to_string(region.row_end) +
                   ") are not a part of [0, " + to_string(this->num_rows(region.sequence)) + ")";
        });
        for (int64_t i = 0; i < inputs.count; ++i) read(input(inputs, i), region);
        write(words_[ReductionWords::kDstBatch], region);
    }

    Inputs check_list(const ReductionShape& shape) const {
        check_in(rules::kInputCount,
                 "the number of inputs",
                 shape.num_listed,
                 1,
                 kMaxReductionInputs + 1);
        check_reserved(ReductionWords::kInputs + shape.num_listed);
        return {false, shape.num_listed};
    }

    Inputs check_run(const ReductionShape& shape) const {
        check(shape.num_listed == 1, rules::kReserved, "a run has bits 0 to 7 of word 2 set");
        check_reserved(ReductionWords::kRunEnd);
        const Inputs run{true,
                         words_[ReductionWords::kRunCount],
                         words_[ReductionWords::kRunFirst],
                         words_[ReductionWords::kRunStep]};
        check_in(rules::kInputCount, "the number of inputs", run.count, 1, kMaxRunInputs + 1);
        check(run.step >= 1, rules::kRun, "the step is " + to_string(run.step));
        const int32_t row_offset = words_[ReductionWords::kRunRowOffset];
        check(row_offset >= 0, rules::kRun, "row_offset is " + to_string(row_offset));
        check_in(rules::kInput, "first_input", run.first, 0, num_slots_);
        check_in(
            rules::kInput, "the last input", run.first + (run.count - 1) * run.step, 0, num_slots_);
        return run;
    }

    int64_t input(const Inputs& inputs, int64_t i) const {
        return inputs.is_run ? inputs.first + i * inputs.step : words_[ReductionWords::kInputs + i];
    }

    const Slot& slot_of(int64_t input) const {
        check_in(rules::kInput, "input", input, 0, num_slots_);
        const auto found = slots_.find(static_cast<int32_t>(input));
        check(found != slots_.end(), rules::kOrder, [&] {
            return "no earlier instruction writes input " + to_string(input);
        });
        return found->second;
    }

    void read(int64_t input, const Region& region) {
        const Slot& slot = slot_of(input);
        check(region.sequence == slot.region.sequence, rules::kInputRequest, [&] {
            return "input " + to_string(input) + " is of sequence " +
                   to_string(slot.region.sequence) + ", what it is merged with of sequence " +
                   to_string(region.sequence);
        });
        check(slot.region.row_begin <= region.row_begin && region.row_end <= slot.region.row_end &&
                  (region.columns & ~slot.region.columns) == 0,
              rules::kInputRows,
              [&] { return "input " + to_string(input) + " lacks rows or columns that are read"; });
        for (int64_t row = region.row_begin; row < region.row_end; ++row) {
            ColumnSet& read = columns_read_[slot.first_row_read + (row - slot.region.row_begin)];
            check((read & region.columns) == 0, rules::kReadOnce, [&] {
                return "input " + to_string(input) + " was read before, " + row_name(row);
            });
            read |= region.columns;
        }
    }

    void check_fill() {
        check_reserved(FillWords::kWordsUsed);
        const int32_t begin = words_[FillWords::kTokenBegin];
        const int32_t end = words_[FillWords::kTokenEnd];
        const auto range_name = [&] {
            return "tokens [" + to_string(begin) + ", " + to_string(end) + ")";
        };
        check(begin < end, rules::kFill, [&] { return range_name() + " are none"; });
        // The last range that begins no later.
        auto range = std::upper_bound(
            unfilled_.begin(), unfilled_.end(), begin, [](int32_t token, const TokenRange& other) {
                return token < other.begin;
            });
        check(range != unfilled_.begin() && end <= std::prev(range)->end, rules::kFill, [&] {
            return range_name() + " are not all without keys";
        });
        const auto next = filled_.lower_bound(begin);
        const bool overlaps = (next != filled_.end() && next->first < end) ||
                              (next != filled_.begin() && std::prev(next)->second > begin);
        check(!overlaps, rules::kOutputOnce, [&] {
            return range_name() + " were filled before, at least in part";
        });
        filled_.emplace_hint(next, begin, end);
    }

    void write(int32_t dst_batch, const Region& region) {
        if (dst_batch >= 0) {
            write_output(dst_batch, region);
            return;
        }
        const int64_t slot = -int64_t{dst_batch} - 1;
        check_in(rules::kSlot, "scratch slot", slot, 0, num_slots_);
        check(slot == uid(), rules::kSlot, [&] {
            return "writes scratch slot " + to_string(slot) + ", which is not its uid";
        });
        slots_[uid()] = {region, columns_read_.size()};
        columns_read_.resize(columns_read_.size() + (region.row_end - region.row_begin));
    }

    void write_output(int32_t sequence, const Region& region) {
        check(sequence == region.sequence, rules::kDestination, [&] {
            return "writes the output of sequence " + to_string(sequence) + " from sequence " +
                   to_string(region.sequence);
        });
        for (int64_t row = region.row_begin; row < region.row_end; ++row) {
            ColumnSet& written = columns_written_[first_row_[sequence] + row];
            check((written & region.columns) == 0, rules::kOutputOnce, [&] {
                return "the output of sequence " + to_string(sequence) + " was written before, " +
                       row_name(row);
            });
            written |= region.columns;
        }
    }

    void check_all_read() const {
        int32_t first_unread = -1;
        for (const auto& [uid, slot] : slots_) {
            const Region& region = slot.region;
            for (int64_t row = region.row_begin; row < region.row_end; ++row) {
                if (columns_read_[slot.first_row_read + (row - region.row_begin)] ==
                    region.columns) {
                    continue;
                }
                if (first_unread < 0 || uid < first_unread) first_unread = uid;
            }
        }
        if (first_unread < 0) return;
        fail(rules::kUnread,
             "uid " + to_string(first_unread) + ": its scratch slot is not read in full");
    }

    void check_all_filled() const {
        auto fill = filled_.begin();
        for (const TokenRange& range : unfilled_) {
            int32_t token = range.begin;
            for (; fill != filled_.end() && fill->first == token; ++fill) token = fill->second;
            if (token == range.end) continue;
            fail(rules::kUnfilled, "token " + to_string(token) + " is in no fill");
        }
    }

    // Sweeps over the positions of a sequence; the rows attended to must always be all.
    void check_coverage(int sequence) {
        const int32_t length = batch_.seq_lens[sequence];
        if (length == 0 || num_rows(sequence) == 0) return;

        struct Edge {
            int32_t position;
            bool opens;
            const Rectangle* rectangle;
        };
        std::vector<Edge> edges;
        for (const Rectangle& rectangle : rectangles_[sequence]) {
            edges.push_back({rectangle.start, true, &rectangle});
            edges.push_back({rectangle.end, false, &rectangle});
        }
        // At one position, what ends makes room for what begins.
        std::stable_sort(edges.begin(), edges.end(), [](const Edge& a, const Edge& b) {
            return a.position != b.position ? a.position < b.position : a.opens < b.opens;
        });

        std::map<int64_t, const Rectangle*> open;  // by row_begin; disjoint
        int64_t num_rows_open = 0;
        int32_t position = 0;
        for (size_t i = 0; i < edges.size();) {
            if (edges[i].position != position)
                check_rows_open(sequence, position, open, num_rows_open);
            position = edges[i].position;
            for (; i < edges.size() && edges[i].position == position; ++i) {
                const Rectangle& rectangle = *edges[i].rectangle;
                const int64_t num_rows = rectangle.row_end - rectangle.row_begin;
                if (edges[i].opens) {
                    insert(sequence, position, rectangle, open);
                    num_rows_open += num_rows;
                } else {
                    open.erase(rectangle.row_begin);
                    num_rows_open -= num_rows;
                }
            }
        }
        if (position < length) check_rows_open(sequence, position, open, num_rows_open);
    }

    void insert(int sequence,
                int32_t position,
                const Rectangle& rectangle,
                std::map<int64_t, const Rectangle*>& open) const {
        const auto next = open.lower_bound(rectangle.row_begin);
        const Rectangle* other = nullptr;
        if (next != open.end() && next->first < rectangle.row_end) other = next->second;
        if (next != open.begin() && std::prev(next)->second->row_end > rectangle.row_begin) {
            other = std::prev(next)->second;
        }
        if (other != nullptr) {
            fail(rules::kCoveredTwice,
                 "uid " + to_string(rectangle.uid) + ": sequence " + to_string(sequence) + ", " +
                     row_name(std::max(rectangle.row_begin, other->row_begin)) + ", position " +
                     to_string(position) + " is covered by uid " + to_string(other->uid) +
                     " as well");
        }
        open.emplace_hint(next, rectangle.row_begin, &rectangle);
    }

    void check_rows_open(int sequence,
                         int32_t position,
                         const std::map<int64_t, const Rectangle*>& open,
                         int64_t num_rows_open) const {
        if (num_rows_open == num_rows(sequence)) return;
        int64_t row = 0;
        for (const auto& [row_begin, rectangle] : open) {
            if (row_begin != row) break;
            row = rectangle->row_end;
        }
        fail(rules::kUncovered,
             "sequence " + to_string(sequence) + ", " + row_name(row) + ": position " +
                 to_string(position) + " is covered by no partial");
    }

    static ColumnSet columns_of(int col_begin, int num_cols) {
        const int chunks = num_cols / kColumnChunk;
        return static_cast<ColumnSet>(((1 << chunks) - 1) << (col_begin / kColumnChunk));
    }

    std::string row_name(int64_t row) const {
        return "token " + to_string(row / num_heads_) + " head " + to_string(row % num_heads_);
    }

    std::string next_mate_name() const {
        return "mate " + to_string(next_mate_) + " of " + to_string(num_mates_);
    }

    int32_t uid() const { return words_[kWordUid]; }
    int64_t num_rows(int sequence) const {
        return int64_t{batch_.new_tokens[sequence]} * num_heads_;
    }

    const Batch& batch_;
    const int num_heads_;
    const int num_slots_;
    const std::vector<TokenRange> unfilled_;  // all tokens that need a fill

    int64_t index_ = 0;  // the instruction in hand
    const int32_t* words_ = nullptr;

    int32_t num_mates_ = kMaxMates;  // of the instruction before
    int32_t next_mate_ = 0;          // > 0: this mate of them must come next

    std::unordered_set<int32_t> uids_;
    std::unordered_map<int32_t, Slot> slots_;
    std::vector<ColumnSet> columns_read_;             // of each row of each slot
    std::vector<int64_t> first_row_;                  // of each sequence, in columns_written_
    std::vector<ColumnSet> columns_written_;          // of each row of each sequence's output
    std::vector<std::vector<Rectangle>> rectangles_;  // by sequence
    std::map<int32_t, int32_t> filled_;               // tokens: begin, end; disjoint
};

}  // namespace

void validate(const Queue& queue, const Batch& batch, int num_slots, int64_t capacity) {
    check_batch(batch);
    check_range("num_slots", num_slots, 0, INT32_MAX);
    if (batch.num_sequences() > capacity) {
        fail(rules::kBatch,
             to_string(batch.num_sequences()) + " sequences, the tensors hold " +
                 to_string(capacity));
    }
    Validator(batch, num_slots).run(queue);
}

}  // namespace mla
