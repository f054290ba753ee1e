// The 32 words of an instruction: the one definition that the scheduler, the
// bindings and the kernels share. Plain C++17, no CUDA.
//
// The field order is that of ThunderKittens' MLA decode; words 9 and up of a
// partial, the upper bits of a reduction's word 2, and the fill, came later. Zero
// in them means what it meant there: the whole, unsliced.
//
// A *sequence* is one KV head of one request. Its *rows* are its (token, head)
// pairs, row = token * num_heads + head; rows [64 g, 64 g + 64) are a *row group*, or as many as a
// scratch slot holds, see group_rows_of. A partial works on one whole row group; scratch slots and
// reductions belong to one.
#pragma once

#include <cstdint>

namespace mla {

inline constexpr int kInstructionWords = 32;
inline constexpr int kQueueVersion = 3;

enum class Opcode : int32_t {
    kEndOfQueue = -1,
    kNoop = 0,
    kMlaPartial = 1,
    kMlaReduction = 2,
    kMlaFill = 3,
};

inline constexpr int kLatentDim = 512;  // width of V, and of the no-position part of Q and K
inline constexpr int kRopeDim = 64;
inline constexpr int kKvTile = 64;              // KV positions per tile; starts are multiples
inline constexpr int kMaxRows = 64;             // rows of a row group: one wgmma M tile
inline constexpr int kNarrowRows = 32;          // no group has more: a narrow kernel runs the batch
inline constexpr int kNarrowestRows = 16;       // another one if none has more than these
inline constexpr int kNarrowTilesAtOnce = 2;    // one for each of its warpgroups
inline constexpr int kMaxReductionInputs = 27;  // that a reduction can list
inline constexpr int kMaxRunInputs = 1 << 16;   // that a reduction can read as a run of slots
inline constexpr int kMaxMates = 8;             // CTAs that may share a partial
inline constexpr int kColumnChunk = 64;         // granularity of a reduction's column slice

// Whether a reduction of so many chunks and inputs reads stamped results: each of 16 teams has one
// chunk at most, or its share of the inputs of one, and 16 inputs.
constexpr bool fits_stamps(int num_chunks, int num_inputs) {
    constexpr int kTeams = 16;
    int most_inputs = 16;
    for (int shared = num_chunks; 2 * shared <= kTeams; shared *= 2) most_inputs *= 2;
    return num_chunks <= kTeams && num_inputs <= most_inputs;
}

// Rows of every row group but a sequence's last, by those of a scratch slot. Several small groups
// instead of a large one read the same keys, but merge faster.
constexpr int group_rows_of(int slot_rows) {
    return slot_rows == kNarrowestRows || slot_rows == kNarrowRows ? slot_rows : kMaxRows;
}

// Word indices shared by all opcodes.
inline constexpr int kWordOpcode = 0;
inline constexpr int kWordUid = 1;

// Attention of a row group of one sequence over its KV positions [start, end).
struct PartialWords {
    static constexpr int kDstBatch = 2;  // >= 0: output; < 0: scratch slot -dst_batch - 1
    static constexpr int kDstSeq = 3;
    static constexpr int kQBatch = 4;    // sequence
    static constexpr int kQSeq = 5;      // token that rows count from
    static constexpr int kStart = 6;     // multiple of kKvTile
    static constexpr int kEnd = 7;       // exclusive
    static constexpr int kLength = 8;    // KV length of the request, new tokens included
    static constexpr int kRowBegin = 9;  // first row, from q_seq * num_heads on
    static constexpr int kNumRows = 10;  // 0: all of the row group
    // CTAs of a cluster that share a destination: a power of two, 0 meaning one. They run their
    // partials at the same time, each as its first instruction, neighbours in the queue.
    static constexpr int kNumMates = 11;
    static constexpr int kMate = 12;  // which of them this one is for
    // 1 + the scratch slot of an earlier partial of the row group, over other keys, whose result
    // joins this one's; 0: none. Not with mates.
    static constexpr int kAdopted = 13;
};

// Merge of scratch slots of one row group, over a slice of rows and columns.
struct ReductionWords {
    static constexpr int kShape = 2;  // see ReductionShape
    static constexpr int kDstBatch = 3;
    static constexpr int kDstSeq = 4;
    // Inputs, listed by uid (= scratch slot) ...
    static constexpr int kInputs = 5;
    // ... or as a run of slots: first, first + step, ...
    static constexpr int kRunFirst = 5;
    static constexpr int kRunCount = 6;
    static constexpr int kRunStep = 7;
    static constexpr int kRunRowOffset = 8;  // added to the first row
    static constexpr int kRunEnd = 9;        // words from here on are 0
};
static_assert(ReductionWords::kInputs + kMaxReductionInputs == kInstructionWords,
              "a reduction's inputs fill the instruction");

// Zeros for rows that have no keys.
struct FillWords {
    static constexpr int kTokenBegin = 2;  // tokens as the output counts them
    static constexpr int kTokenEnd = 3;    // exclusive
    static constexpr int kWordsUsed = 4;
};

// Word 2 of a reduction. Bits: 0-7 listed inputs - 1 (0 in a run), 8-15 first head, 16-23 rows
// (0: the heads that are left), 24-26 first column / 64, 27-30 columns / 64 (0: all that are left),
// 31 the inputs are a run.
struct ReductionShape {
    int num_listed;
    int head_begin;
    int num_rows;   // 0: all heads of the token from head_begin on
    int col_begin;  // multiple of kColumnChunk
    int num_cols;   // multiple of kColumnChunk; 0: all columns from col_begin on
    bool is_run;

    constexpr int32_t pack() const {
        return static_cast<int32_t>((is_run ? 0u : static_cast<uint32_t>(num_listed - 1)) |
                                    static_cast<uint32_t>(head_begin) << 8 |
                                    static_cast<uint32_t>(num_rows) << 16 |
                                    static_cast<uint32_t>(col_begin / kColumnChunk) << 24 |
                                    static_cast<uint32_t>(num_cols / kColumnChunk) << 27 |
                                    static_cast<uint32_t>(is_run) << 31);
    }
    static constexpr ReductionShape unpack(int32_t word) {
        const auto bits = static_cast<uint32_t>(word);
        return {static_cast<int>(bits & 0xff) + 1,
                static_cast<int>(bits >> 8 & 0xff),
                static_cast<int>(bits >> 16 & 0xff),
                static_cast<int>(bits >> 24 & 0x7) * kColumnChunk,
                static_cast<int>(bits >> 27 & 0xf) * kColumnChunk,
                (bits >> 31) != 0};
    }
};

}  // namespace mla
