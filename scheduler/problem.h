// What is to be planned: a batch of requests, and the machine's width.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "instructions/layout.h"

namespace mla {

inline constexpr int kMaxHeads = 128;     // a reduction's head slice has 8 bits
inline constexpr int kMaxNewTokens = 64;  // the kernels support fewer; the format does not care
inline constexpr int kMaxWorkers = 1 << 14;

constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// Row groups of one request: its (token, head) rows, cut to what a partial holds.
constexpr int num_row_groups(int num_heads, int new_tokens) {
    return ceil_div(num_heads * new_tokens, kMaxRows);
}

struct Problem {
    std::vector<int32_t> seq_lens;  // KV length of each request, new tokens included; >= 1
    int num_heads = 0;
    int new_tokens = 0;
    int num_workers = 0;  // CTAs, one per SM

    int num_requests() const { return static_cast<int>(seq_lens.size()); }
    int num_rows() const { return num_heads * new_tokens; }
    int row_groups() const { return num_row_groups(num_heads, new_tokens); }
    int num_tiles(int request) const { return ceil_div(seq_lens[request], kKvTile); }
    // Row groups of a request run side by side, one gang of workers for each KV piece.
    int num_gangs() const { return num_workers > row_groups() ? num_workers / row_groups() : 1; }
};

// Throws std::invalid_argument unless low <= value <= high.
inline void check_range(const std::string& name, int64_t value, int64_t low, int64_t high) {
    if (low <= value && value <= high) return;
    throw std::invalid_argument(name + ": expected " + std::to_string(low) + " to " +
                                std::to_string(high) + ", got " + std::to_string(value));
}

inline void check_shape(int num_heads, int new_tokens, int num_workers) {
    check_range("num_heads", num_heads, 1, kMaxHeads);
    check_range("new_tokens", new_tokens, 1, kMaxNewTokens);
    check_range("num_workers", num_workers, 1, kMaxWorkers);
}

}  // namespace mla
