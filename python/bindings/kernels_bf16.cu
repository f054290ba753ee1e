// The megakernels for bf16.
#include "instructions/mla_decode.cuh"

template void mla::launch_element<kittens::bf16>(
    const mla::MlaGlobals&, bool, int, int, cudaStream_t);
