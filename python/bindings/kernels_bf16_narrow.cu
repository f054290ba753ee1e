// The megakernels for bf16, row groups of at most 32 rows.
#include "instructions/mla_decode.cuh"

template void mla::launch_family<kittens::bf16, true>(
    const mla::MlaGlobals&, bool, int, int, cudaStream_t);
