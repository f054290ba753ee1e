// What a reduction is asked to do, and how it uses semaphores: what its roles agree
// on.
#pragma once

#include "instructions/mla_globals.cuh"

namespace mla {

// The words, decoded.
struct ReductionWork {
    using Words = ReductionWords;

    const int32_t* listed;  // null: a run
    int num_inputs, run_first, run_step;
    int dst_batch, num_rows, col_begin, num_cols;
    int first_row;       // in its slot
    int flat_row;        // the same, as the output counts it
    int rows_per_chunk;  // in 1/65536

    // Row groups begin at multiples of `group_rows`, a power of two.
    __device__ ReductionWork(const MlaGlobals& g, const int32_t* words, uint32_t group_rows) {
        const auto shape = ReductionShape::unpack(words[Words::kShape]);
        listed = shape.is_run ? nullptr : words + Words::kInputs;
        num_inputs = shape.is_run ? words[Words::kRunCount] : shape.num_listed;
        run_first = words[Words::kRunFirst];
        run_step = words[Words::kRunStep];
        dst_batch = words[Words::kDstBatch];
        const int row_offset = shape.is_run ? words[Words::kRunRowOffset] : 0;
        flat_row = words[Words::kDstSeq] * g.num_heads + shape.head_begin + row_offset;
        first_row = static_cast<uint32_t>(flat_row) % group_rows;
        if (!writes_scratch(dst_batch)) flat_row += g.tokens_of(dst_batch).first * g.num_heads;
        num_rows = shape.num_rows > 0 ? shape.num_rows : g.num_heads - shape.head_begin;
        col_begin = shape.col_begin;
        num_cols = shape.num_cols > 0 ? shape.num_cols : kLatentDim - col_begin;
        const auto chunks = static_cast<float>(chunks_per_row());
        rows_per_chunk = static_cast<int>((1 << 16) * mk::ptx::reciprocal_approx(chunks)) + 1;
    }
    __device__ int slot(int input) const {
        return listed != nullptr ? listed[input] : run_first + input * run_step;
    }
    __device__ int chunks_per_row() const { return num_cols / kColumnChunk; }
    __device__ int num_chunks() const { return num_rows * chunks_per_row(); }
    // chunk / chunks_per_row(), exact for as many chunks as there can be.
    __device__ int row_of_chunk(int chunk) const { return chunk * rows_per_chunk >> 16; }
};

inline constexpr int kReductionBatches = 3;  // that have a place in the pages

enum ReductionSemaphore {
    kPagesFree = 0,  // in which inputs wait for their turn
    kInputsSeen,     // consumers have seen the flags of all inputs
    kResultStored,   // and have written their part
    kBatchCopied,    // + place of a batch in the pages: its inputs are there
    kNumReductionSemaphores = kBatchCopied + kReductionBatches,
};

}  // namespace mla
