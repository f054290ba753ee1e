// What the team that plans shares: per-sequence and per-partial arrays in one block of memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "scheduler/device_plan_choice.h"
#include "scheduler/device_plan_problem.h"

namespace mla {

// Of a sequence: tiles and row groups.
struct SequenceShape {
    static constexpr int kGroupBits = 6;
    uint32_t word;

    MLA_HOST_DEVICE static SequenceShape of(int length, uint32_t groups) {
        const uint32_t tiles = (static_cast<uint32_t>(length) + kKvTile - 1) / kKvTile;
        return {tiles << kGroupBits | groups};
    }
    MLA_HOST_DEVICE uint32_t tiles() const { return word >> kGroupBits; }
    MLA_HOST_DEVICE uint32_t groups() const { return word & ((1 << kGroupBits) - 1); }
};
static_assert(device_plan::kMaxGroups < 1 << SequenceShape::kGroupBits, "row groups in their bits");

// One way to cut, and what follows.
struct Candidate {
    EvenCut even;
    CutTotals totals;
    uint32_t log2_mates;  // the most of a row group
    int noops;
};

struct DevicePlanState {
    // Of every sequence.
    SequenceShape* shape;
    int32_t* length;  // 0 without rows
    int32_t* rows;
    uint32_t* pieces;
    uint32_t* first_cut;  // of the line, inside the sequence
    uint32_t* slices;     // see Slices
    uint32_t* line;       // what it takes of the line; of the line, prefix sums and their total
    // Prefix sums one behind the other: partials, slots, then reductions and fills; and the total.
    uint32_t* sums;
    // Of every partial when they are sorted: its sequence and key, its place in the queue.
    uint32_t* keys;
    uint32_t* places;
    uint32_t* sort_table;
    // Of every candidate.
    uint32_t* candidate_ns;
    Candidate* candidates;
};

// Carves the state out of one block of memory, and returns how much it takes; `memory` may be null
// to ask for that. The problem's constants are set.
MLA_HOST_DEVICE uint32_t device_plan_layout(const DevicePlanProblem& p,
                                            unsigned char* memory,
                                            DevicePlanState* state) {
    uint32_t used = 0;
    const auto take = [&](auto*& pointer, uint32_t count) {
        using T = std::remove_reference_t<decltype(*pointer)>;
        pointer = reinterpret_cast<T*>(memory + used);
        used += count * static_cast<uint32_t>(sizeof(T));
    };
    DevicePlanState s;
    const uint32_t n = p.num_sequences();
    const uint32_t sorted = p.balances() ? p.constants.most_partials : 0;
    take(s.candidate_ns, device_plan::kCandidates);
    take(s.candidates, device_plan::kCandidates);
    take(s.shape, n);
    take(s.length, n);
    take(s.rows, n);
    take(s.pieces, n);
    take(s.first_cut, n);
    take(s.slices, n);
    take(s.line, n + 1);
    take(s.sums, 3 * n + 1);
    take(s.keys, sorted);
    take(s.places, sorted);
    const uint32_t groups = (sorted + device_plan::kSortGroup - 1) / device_plan::kSortGroup;
    take(s.sort_table, device_plan::kKeys * groups + 1);
    if (state != nullptr) *state = s;
    return used;
}

// Rows of 32 words that a plan's tensor needs: the instructions, and the planner's state if shared
// memory cannot hold it.
inline int64_t device_plan_rows(const DevicePlanProblem& p) {
    const int64_t bytes = device_plan_layout(with_constants(p), nullptr, nullptr);
    const int64_t instructions = device_plan_capacity(p).instructions;
    constexpr int64_t kRowBytes = kInstructionWords * sizeof(int32_t);
    if (bytes <= kDevicePlanSmemBytes) return instructions;
    return instructions + device_plan::ceil_div(bytes, kRowBytes);
}

}  // namespace mla
