#include "scheduler/problem.h"

#include <algorithm>

namespace mla {

namespace {

// Output that one fill writes at most.
constexpr int kFillBytes = 256 * 1024;
constexpr int kOutputRowBytes = kLatentDim * 2;

void append_fills(const TokenRange& range, int num_heads, std::vector<TokenRange>& fills) {
    const int most = tokens_per_fill(num_heads);
    for (int32_t begin = range.begin; begin < range.end;) {
        const int32_t end = range.end - begin > most ? begin + most : range.end;
        fills.push_back({begin, end});
        begin = end;
    }
}

}  // namespace

int Problem::longest() const {
    int longest = 0;
    for (const Sequence& sequence : sequences) longest = std::max(longest, sequence.num_tiles());
    return longest;
}

int64_t Problem::gangs_unsplit() const {
    int64_t gangs = 0;
    for (int sequence = 0; sequence < num_sequences(); ++sequence) {
        gangs += gangs_per_piece(sequence);
    }
    return gangs;
}

int tokens_per_fill(int num_heads) {
    return std::max(1, kFillBytes / (kOutputRowBytes * num_heads));
}

Problem make_problem(const Batch& batch, int num_workers) {
    Problem problem;
    problem.num_heads = batch.num_heads;
    problem.group_rows = batch.group_rows;
    problem.num_workers = num_workers;
    double tiles = 0.0;
    double group_tiles = 0.0;
    for (int id = 0; id < batch.num_sequences(); ++id) {
        const Sequence sequence{
            id, batch.seq_lens[id], batch.new_tokens[id] * batch.num_heads, batch.row_groups(id)};
        if (sequence.length == 0 || sequence.num_rows == 0) continue;
        problem.sequences.push_back(sequence);
        tiles += sequence.num_tiles();
        group_tiles += static_cast<double>(sequence.num_tiles()) * sequence.row_groups;
        if (sequence.row_groups != problem.row_groups(0)) problem.uniform = false;
    }
    if (!problem.sequences.empty()) {
        problem.kv_sharing = group_tiles / tiles;
        if (problem.uniform) problem.gang_size = problem.row_groups(0);
    }
    for (const TokenRange& range : tokens_to_fill(batch)) {
        append_fills(range, batch.num_heads, problem.fills);
    }
    return problem;
}

}  // namespace mla
