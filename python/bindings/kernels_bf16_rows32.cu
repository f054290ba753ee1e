// The megakernels for bf16, row groups of at most 32 rows.
#include "instructions/mla_decode.cuh"

template void mla::launch_family<kittens::bf16, 32>(
    const mla::MlaGlobals&, bool, mk::Grid, int, cudaStream_t);

int mla::max_clusters(int cluster_ctas, int device) {
    using Config = MlaConfig<kittens::bf16, true, kNarrowRows>;
    return mk::max_clusters<Config, MlaOps<Config>, MlaGlobals>(cluster_ctas, device);
}
