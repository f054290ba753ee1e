#include "scheduler/batch.h"

#include <stdexcept>

namespace mla {

void check_range(const std::string& name, int64_t value, int64_t low, int64_t high) {
    if (low <= value && value <= high) return;
    throw std::invalid_argument(name + ": expected " + std::to_string(low) + " to " +
                                std::to_string(high) + ", got " + std::to_string(value));
}

void check_group_rows(int group_rows) {
    for (const int rows : {kNarrowestRows, kNarrowRows, kMaxRows}) {
        if (group_rows == rows) return;
    }
    throw std::invalid_argument("group_rows: expected 16, 32 or 64, got " +
                                std::to_string(group_rows));
}

void check_batch(const Batch& batch) {
    check_group_rows(batch.group_rows);
    check_range("num_heads", batch.num_heads, 1, kMaxHeads);
    check_range("num_kv_heads", batch.num_kv_heads, 1, INT32_MAX);
    if (batch.new_tokens.size() != batch.seq_lens.size()) {
        throw std::invalid_argument("new_tokens: expected one for each of " +
                                    std::to_string(batch.seq_lens.size()) + " sequences, got " +
                                    std::to_string(batch.new_tokens.size()));
    }
    if (batch.num_sequences() % batch.num_kv_heads != 0) {
        throw std::invalid_argument("seq_lens: expected a multiple of num_kv_heads " +
                                    std::to_string(batch.num_kv_heads) + ", got " +
                                    std::to_string(batch.num_sequences()));
    }
    check_range("total_tokens", batch.total_tokens, 0, INT32_MAX);
    if (batch.total_tokens % batch.num_kv_heads != 0) {
        throw std::invalid_argument("total_tokens: expected a multiple of num_kv_heads " +
                                    std::to_string(batch.num_kv_heads) + ", got " +
                                    std::to_string(batch.total_tokens));
    }
    const int64_t tokens_per_head = batch.total_tokens / batch.num_kv_heads;
    const int num_requests = batch.num_sequences() / batch.num_kv_heads;
    int64_t tokens = 0;
    for (int i = 0; i < batch.num_sequences(); ++i) {
        const auto check_entry = [i](const char* name, int64_t value, int64_t high) {
            if (0 <= value && value <= high) return;
            check_range(name + ("[" + std::to_string(i) + "]"), value, 0, high);
        };
        check_entry("seq_lens", batch.seq_lens[i], INT32_MAX);
        check_entry("new_tokens", batch.new_tokens[i], kMaxNewTokens);
        if (i % num_requests == 0) tokens = 0;
        tokens += batch.new_tokens[i];
        if (tokens > tokens_per_head) {
            throw std::invalid_argument(
                "total_tokens: " + std::to_string(batch.total_tokens) +
                " are too few: the sequences of one KV head have more than " +
                std::to_string(tokens_per_head));
        }
    }
}

std::vector<TokenRange> tokens_to_fill(const Batch& batch) {
    std::vector<TokenRange> ranges;
    const auto append = [&ranges](int64_t begin, int64_t end) {
        if (begin == end) return;
        if (ranges.empty() || ranges.back().end != begin) {
            ranges.push_back({static_cast<int32_t>(begin), 0});
        }
        ranges.back().end = static_cast<int32_t>(end);
    };
    const int64_t tokens_per_head = batch.total_tokens / batch.num_kv_heads;
    const int num_requests = batch.num_sequences() / batch.num_kv_heads;
    for (int64_t kv_head = 0; kv_head < batch.num_kv_heads; ++kv_head) {
        int64_t token = kv_head * tokens_per_head;
        for (int request = 0; request < num_requests; ++request) {
            const int64_t sequence = kv_head * num_requests + request;
            const int64_t end = token + batch.new_tokens[sequence];
            if (batch.seq_lens[sequence] == 0) append(token, end);
            token = end;
        }
        append(token, (kv_head + 1) * tokens_per_head);
    }
    return ranges;
}

}  // namespace mla
