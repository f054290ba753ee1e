#include "scheduler/validator.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "scheduler/errors.h"
#include "scheduler/problem.h"

namespace mla {

namespace {

using std::to_string;

// A set of column chunks of one row, one bit each.
using ColumnSet = uint8_t;
static_assert(kLatentDim / kColumnChunk == 8, "a ColumnSet has 8 bits");
constexpr ColumnSet kAllColumns = 0xff;

// Rows [begin, end) of a request, row = token * num_heads + head, in some columns.
struct Region {
    int32_t request;
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
    Validator(const std::vector<int32_t>& seq_lens, int num_heads, int new_tokens, int num_slots)
        : seq_lens_(seq_lens),
          num_heads_(num_heads),
          new_tokens_(new_tokens),
          num_slots_(num_slots),
          rows_per_request_(int64_t{num_heads} * new_tokens),
          columns_written_(seq_lens.size() * rows_per_request_),
          rectangles_(seq_lens.size()) {}

    void run(const Queue& queue) {
        bool ended = false;
        for (index_ = 0; index_ < queue.num_instructions; ++index_) {
            words_ = queue.words + index_ * kInstructionWords;
            const auto opcode = static_cast<Opcode>(words_[kWordOpcode]);
            check(!ended || opcode == Opcode::kEndOfQueue,
                  rules::kEndOfQueue,
                  "runs behind the end of the queue");
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
                default:
                    check(
                        false, rules::kOpcode, "unknown opcode " + to_string(words_[kWordOpcode]));
            }
        }
        check_all_read();
        for (size_t request = 0; request < seq_lens_.size(); ++request) check_coverage(request);
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

    void check_partial() {
        check_reserved(PartialWords::kNumRows + 1);
        const int32_t request = words_[PartialWords::kQBatch];
        check_in(rules::kRequest, "q_batch", request, 0, num_requests());

        const int32_t token = words_[PartialWords::kQSeq];
        check_in(rules::kToken, "q_seq", token, 0, new_tokens_);
        check(words_[PartialWords::kDstSeq] == token, rules::kToken, [&] {
            return "dst_seq " + to_string(words_[PartialWords::kDstSeq]) + " is not q_seq " +
                   to_string(token);
        });

        const int64_t num_rows_left = int64_t{new_tokens_ - token} * num_heads_;
        const int32_t row_begin = words_[PartialWords::kRowBegin];
        check_in(rules::kRows, "row_begin", row_begin, 0, num_rows_left);
        int64_t num_rows = words_[PartialWords::kNumRows];
        if (num_rows == 0) num_rows = num_rows_left - row_begin;
        check_in(rules::kRows, "num_rows", num_rows, 1, kMaxRows + 1);
        check_in(rules::kRows, "the last row", row_begin + num_rows - 1, 0, num_rows_left);
        // The kernel moves whole row groups: fewer rows would overwrite those behind them.
        const int64_t group = std::min<int64_t>(kMaxRows, int64_t{new_tokens_} * num_heads_);
        check(num_rows == std::min(group, num_rows_left - row_begin), rules::kRows, [&] {
            return "num_rows is " + to_string(num_rows) + ", neither a row group of " +
                   to_string(group) + " nor all rows that are left";
        });

        const int32_t length = words_[PartialWords::kLength];
        check(length == seq_lens_[request], rules::kLength, [&] {
            return "length " + to_string(length) + " is not request " + to_string(request) + "'s " +
                   to_string(seq_lens_[request]);
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

        const int64_t first_row = int64_t{token} * num_heads_ + row_begin;
        const Region region{request, first_row, first_row + num_rows, kAllColumns};
        write(words_[PartialWords::kDstBatch], region);
        rectangles_[request].push_back({region.row_begin, region.row_end, start, end, uid()});
    }

    void check_reduction() {
        const int32_t packed = words_[ReductionWords::kShape];
        check(packed >= 0, rules::kReserved, "bit 31 of word 2 is set");
        auto shape = ReductionShape::unpack(packed);
        check_in(rules::kInputCount,
                 "the number of inputs",
                 shape.num_inputs,
                 1,
                 kMaxReductionInputs + 1);
        check_reserved(ReductionWords::kInputs + shape.num_inputs);

        const int32_t token = words_[ReductionWords::kDstSeq];
        check_in(rules::kToken, "dst_seq", token, 0, new_tokens_);

        if (shape.num_heads == 0) shape.num_heads = num_heads_ - shape.head_begin;
        if (shape.num_cols == 0) shape.num_cols = kLatentDim - shape.col_begin;
        const int head_end = shape.head_begin + shape.num_heads;
        const int col_end = shape.col_begin + shape.num_cols;
        check(shape.num_heads >= 1 && head_end <= num_heads_, rules::kSlice, [&] {
            return "heads [" + to_string(shape.head_begin) + ", " + to_string(head_end) +
                   ") are not a part of [0, " + to_string(num_heads_) + ")";
        });
        check(col_end <= kLatentDim, rules::kSlice, [&] {
            return "columns [" + to_string(shape.col_begin) + ", " + to_string(col_end) +
                   ") are not a part of [0, " + to_string(kLatentDim) + ")";
        });

        const int64_t first_row = int64_t{token} * num_heads_;
        Region region{kNoRequest,
                      first_row + shape.head_begin,
                      first_row + head_end,
                      columns_of(shape.col_begin, shape.num_cols)};
        for (int i = 0; i < shape.num_inputs; ++i) {
            read(words_[ReductionWords::kInputs + i], region);
        }
        write(words_[ReductionWords::kDstBatch], region);
    }

    // `region` takes the request of the first input.
    void read(int32_t input, Region& region) {
        check_in(rules::kInput, "input", input, 0, num_slots_);
        const auto found = slots_.find(input);
        check(found != slots_.end(), rules::kOrder, [&] {
            return "no earlier instruction writes input " + to_string(input);
        });
        const Slot& slot = found->second;
        if (region.request == kNoRequest) region.request = slot.region.request;
        check(region.request == slot.region.request, rules::kInputRequest, [&] {
            return "input " + to_string(input) + " is of request " +
                   to_string(slot.region.request) + ", others are of request " +
                   to_string(region.request);
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

    void write_output(int32_t request, const Region& region) {
        check(request == region.request, rules::kDestination, [&] {
            return "writes the output of request " + to_string(request) + " from request " +
                   to_string(region.request);
        });
        for (int64_t row = region.row_begin; row < region.row_end; ++row) {
            ColumnSet& written = columns_written_[request * rows_per_request_ + row];
            check((written & region.columns) == 0, rules::kOutputOnce, [&] {
                return "the output of request " + to_string(request) + " was written before, " +
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

    // Sweeps over the positions of a request; the rows attended to must always be all.
    void check_coverage(size_t request) {
        const int32_t length = seq_lens_[request];
        if (length == 0) return;

        struct Edge {
            int32_t position;
            bool opens;
            const Rectangle* rectangle;
        };
        std::vector<Edge> edges;
        for (const Rectangle& rectangle : rectangles_[request]) {
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
                check_rows_open(request, position, open, num_rows_open);
            position = edges[i].position;
            for (; i < edges.size() && edges[i].position == position; ++i) {
                const Rectangle& rectangle = *edges[i].rectangle;
                const int64_t num_rows = rectangle.row_end - rectangle.row_begin;
                if (edges[i].opens) {
                    insert(request, position, rectangle, open);
                    num_rows_open += num_rows;
                } else {
                    open.erase(rectangle.row_begin);
                    num_rows_open -= num_rows;
                }
            }
        }
        if (position < length) check_rows_open(request, position, open, num_rows_open);
    }

    void insert(size_t request,
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
                 "uid " + to_string(rectangle.uid) + ": request " + to_string(request) + ", " +
                     row_name(std::max(rectangle.row_begin, other->row_begin)) + ", position " +
                     to_string(position) + " is covered by uid " + to_string(other->uid) +
                     " as well");
        }
        open.emplace_hint(next, rectangle.row_begin, &rectangle);
    }

    void check_rows_open(size_t request,
                         int32_t position,
                         const std::map<int64_t, const Rectangle*>& open,
                         int64_t num_rows_open) const {
        if (num_rows_open == rows_per_request_) return;
        int64_t row = 0;
        for (const auto& [row_begin, rectangle] : open) {
            if (row_begin != row) break;
            row = rectangle->row_end;
        }
        fail(rules::kUncovered,
             "request " + to_string(request) + ", " + row_name(row) + ": position " +
                 to_string(position) + " is covered by no partial");
    }

    static ColumnSet columns_of(int col_begin, int num_cols) {
        const int chunks = num_cols / kColumnChunk;
        return static_cast<ColumnSet>(((1 << chunks) - 1) << (col_begin / kColumnChunk));
    }

    std::string row_name(int64_t row) const {
        return "token " + to_string(row / num_heads_) + " head " + to_string(row % num_heads_);
    }

    int32_t uid() const { return words_[kWordUid]; }
    int64_t num_requests() const { return static_cast<int64_t>(seq_lens_.size()); }

    static constexpr int32_t kNoRequest = -1;

    const std::vector<int32_t>& seq_lens_;
    const int num_heads_;
    const int new_tokens_;
    const int num_slots_;
    const int64_t rows_per_request_;

    int64_t index_ = 0;  // the instruction in hand
    const int32_t* words_ = nullptr;

    std::unordered_set<int32_t> uids_;
    std::unordered_map<int32_t, Slot> slots_;
    std::vector<ColumnSet> columns_read_;             // of each row of each slot
    std::vector<ColumnSet> columns_written_;          // of each row of each request's output
    std::vector<std::vector<Rectangle>> rectangles_;  // by request
};

}  // namespace

void validate(const Queue& queue,
              const std::vector<int32_t>& seq_lens,
              int num_heads,
              int new_tokens,
              int num_slots,
              int64_t batch) {
    check_shape(num_heads, new_tokens, /*num_workers=*/1);
    check_range("num_slots", num_slots, 0, INT32_MAX);
    for (size_t i = 0; i < seq_lens.size(); ++i) {
        check_range("seq_lens[" + to_string(i) + "]", seq_lens[i], 0, INT32_MAX);
    }
    if (static_cast<int64_t>(seq_lens.size()) > batch) {
        fail(rules::kBatch,
             to_string(seq_lens.size()) + " requests, the tensors hold " + to_string(batch));
    }
    Validator(seq_lens, num_heads, new_tokens, num_slots).run(queue);
}

}  // namespace mla
