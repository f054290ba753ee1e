// The 32 words of an instruction: the one definition that the scheduler, the
// bindings and the kernels share. Plain C++17, no CUDA.
//
// The field order is that of ThunderKittens' MLA decode; words 9 and up of a
// partial, and the upper bits of word 2 of a reduction, were unused there. Zero
// in them means what it meant there: the whole instruction, unsliced.
#pragma once

#include <cstdint>

namespace mla {

inline constexpr int kInstructionWords = 32;
inline constexpr int kQueueVersion = 1;

enum class Opcode : int32_t {
    kEndOfQueue = -1,
    kNoop = 0,
    kMlaPartial = 1,
    kMlaReduction = 2,
};

inline constexpr int kLatentDim = 512;  // width of V, and of the no-position part of Q and K
inline constexpr int kRopeDim = 64;
inline constexpr int kKvTile = 64;   // KV positions per tile; starts are multiples of it
inline constexpr int kMaxRows = 64;  // (token, head) rows per partial: one wgmma M tile
inline constexpr int kMaxReductionInputs = 27;
inline constexpr int kColumnChunk = 64;  // granularity of a reduction's column slice

// Word indices shared by all opcodes.
inline constexpr int kWordOpcode = 0;
inline constexpr int kWordUid = 1;

// Attention of query rows over KV positions [start, end) of one request.
struct PartialWords {
    static constexpr int kDstBatch = 2;  // >= 0: output; < 0: scratch slot -dst_batch - 1
    static constexpr int kDstSeq = 3;
    static constexpr int kQBatch = 4;    // request: row of the block table
    static constexpr int kQSeq = 5;      // token that rows count from
    static constexpr int kStart = 6;     // multiple of kKvTile
    static constexpr int kEnd = 7;       // exclusive
    static constexpr int kLength = 8;    // KV length of the request, new tokens included
    static constexpr int kRowBegin = 9;  // first row, row = (token - q_seq) * num_heads + head
    static constexpr int kNumRows = 10;  // 0: every row from row_begin on
};

// Merge of scratch slots for one token, over a slice of heads and columns.
struct ReductionWords {
    static constexpr int kShape = 2;  // see ReductionShape
    static constexpr int kDstBatch = 3;
    static constexpr int kDstSeq = 4;
    static constexpr int kInputs = 5;  // uids (= scratch slots) of the inputs
};
static_assert(ReductionWords::kInputs + kMaxReductionInputs == kInstructionWords,
              "a reduction's inputs fill the instruction");

// Word 2 of a reduction. Bits: 0-7 inputs - 1, 8-15 first head, 16-23 heads (0: all),
// 24-26 first column / 64, 27-30 columns / 64 (0: all). Bit 31 stays 0.
struct ReductionShape {
    int num_inputs;
    int head_begin;
    int num_heads;  // 0: all heads
    int col_begin;  // multiple of kColumnChunk
    int num_cols;   // multiple of kColumnChunk; 0: all columns

    constexpr int32_t pack() const {
        return static_cast<int32_t>(static_cast<uint32_t>(num_inputs - 1) |
                                    static_cast<uint32_t>(head_begin) << 8 |
                                    static_cast<uint32_t>(num_heads) << 16 |
                                    static_cast<uint32_t>(col_begin / kColumnChunk) << 24 |
                                    static_cast<uint32_t>(num_cols / kColumnChunk) << 27);
    }
    static constexpr ReductionShape unpack(int32_t word) {
        const auto bits = static_cast<uint32_t>(word);
        return {static_cast<int>(bits & 0xff) + 1,
                static_cast<int>(bits >> 8 & 0xff),
                static_cast<int>(bits >> 16 & 0xff),
                static_cast<int>(bits >> 24 & 0x7) * kColumnChunk,
                static_cast<int>(bits >> 27 & 0xf) * kColumnChunk};
    }
};

}  // namespace mla
