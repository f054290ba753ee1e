// The words of a device plan's instructions.
#pragma once

#include <cstdint>

#include "instructions/layout.h"
#include "scheduler/device_plan_cut.h"
#include "scheduler/device_plan_problem.h"

namespace mla {

// The words of an instruction that are not always 0; those left out are.
struct alignas(16) InstructionHead {
    static constexpr int kWords = 16;
    int32_t words[kWords];
};

struct PartialInstruction {
    int32_t uid;
    int32_t sequence;
    bool to_slot;  // whose number is the uid
    int32_t first_tile, end_tile;
    int32_t length;
    int32_t group, rows;  // of the sequence
    int32_t num_mates, mate;

    MLA_HOST_DEVICE InstructionHead head(const DevicePlanProblem& p) const {
        const int32_t row = group << p.group_log2;
        static_assert(PartialWords::kMate == 12, "the words in their order");
        return {{static_cast<int32_t>(Opcode::kMlaPartial),
                 uid,
                 to_slot ? -uid - 1 : sequence,
                 0,
                 sequence,
                 0,
                 first_tile * kKvTile,
                 end_tile > length / kKvTile ? length : end_tile * kKvTile,
                 length,
                 row,
                 device_plan::smaller(p.group_rows(), rows - row),
                 num_mates,
                 mate}};
    }
};

struct ReductionInstruction {
    int32_t uid;
    int32_t sequence;
    int32_t first_slot, pieces, groups;
    int32_t rows;   // of the sequence
    int32_t index;  // among its reductions
    Slices slices;

    MLA_HOST_DEVICE InstructionHead head(const DevicePlanProblem& p) const {
        const auto per_group = static_cast<int32_t>(slices.num_of(p, p.group_rows()));
        const int32_t group = groups == 1 ? 0 : device_plan::smaller(index / per_group, groups - 1);
        const int32_t slice = index - group * per_group;
        const int32_t column = slice & ((1 << slices.log2_columns) - 1);
        const int32_t columns = kLatentDim >> slices.log2_columns;
        const auto slice_rows = static_cast<int32_t>(slices.rows);
        const int32_t row = (group << p.group_log2) + (slice >> slices.log2_columns) * slice_rows;
        const int32_t end = device_plan::smaller(rows, (group + 1) << p.group_log2);
        const ReductionShape shape{
            1, 0, device_plan::smaller(slice_rows, end - row), column * columns, columns, true};
        static_assert(ReductionWords::kRunRowOffset == 8, "the words in their order");
        return {{static_cast<int32_t>(Opcode::kMlaReduction),
                 uid,
                 shape.pack(),
                 sequence,
                 0,
                 first_slot + group,
                 pieces,
                 groups,
                 row}};
    }
};

struct FillInstruction {
    int32_t uid;
    int32_t first_token, end_token;

    MLA_HOST_DEVICE InstructionHead head() const {
        static_assert(FillWords::kTokenEnd == 3, "the words in their order");
        return {{static_cast<int32_t>(Opcode::kMlaFill), uid, first_token, end_token}};
    }
};

}  // namespace mla
