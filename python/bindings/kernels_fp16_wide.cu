// The megakernels for fp16, row groups of up to 64 rows.
#include "instructions/mla_decode.cuh"

template void mla::launch_family<kittens::half, false>(
    const mla::MlaGlobals&, bool, mk::Grid, int, cudaStream_t);
