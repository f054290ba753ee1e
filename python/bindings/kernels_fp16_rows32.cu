// The megakernels for fp16, row groups of at most 32 rows.
#include "instructions/mla_decode.cuh"

template void mla::launch_family<kittens::half, 32>(
    const mla::MlaGlobals&, bool, mk::Grid, int, cudaStream_t);
