// A batch as the queue's words count it: sequences, rows and flat tokens (see
// instructions/layout.h).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "instructions/layout.h"

namespace mla {

inline constexpr int kMaxHeads = 128;     // per KV head; a reduction's first head has 8 bits
inline constexpr int kMaxNewTokens = 16;  // of one sequence
inline constexpr int kMaxWorkers = 1 << 14;

constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// Sequences are KV-head-major: sequence = kv_head * num_requests + request. The tokens of
// one KV head are as many as those of another, and lie one request after the other, with
// padding behind the last.
struct Batch {
    std::vector<int32_t> seq_lens;    // KV length of each sequence, new tokens included
    std::vector<int32_t> new_tokens;  // of each sequence
    int num_heads = 0;                // query heads per KV head
    int num_kv_heads = 1;
    int64_t total_tokens = 0;   // flat tokens of the outputs, padding included
    int group_rows = kMaxRows;  // of a row group: kMaxRows, kNarrowRows or kNarrowestRows

    int num_sequences() const { return static_cast<int>(seq_lens.size()); }
    int row_groups(int sequence) const {
        return ceil_div(num_heads * new_tokens[sequence], group_rows);
    }
};

struct TokenRange {
    int32_t begin;
    int32_t end;  // exclusive
};

// Throws std::invalid_argument unless low <= value <= high.
void check_range(const std::string& name, int64_t value, int64_t low, int64_t high);

// Throws std::invalid_argument unless row groups can have so many rows.
void check_group_rows(int group_rows);

// Throws std::invalid_argument naming the member that is out of its range.
void check_batch(const Batch& batch);

// Flat tokens of sequences without keys, and of padding: maximal ranges, in order.
std::vector<TokenRange> tokens_to_fill(const Batch& batch);

}  // namespace mla
