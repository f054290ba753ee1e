// The megakernels for bf16, row groups of at most 16 rows.
#include "instructions/mla_decode.cuh"

template void mla::launch_family<kittens::bf16, 16>(
    const mla::MlaGlobals&, bool, mk::Grid, int, cudaStream_t);
