// The megakernels for fp16.
#include "instructions/mla_decode.cuh"

template void mla::launch_element<kittens::half>(
    const mla::MlaGlobals&, bool, int, int, cudaStream_t);
