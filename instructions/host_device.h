// For functions that run on the host and on the GPU.
#pragma once

#ifdef __CUDACC__
#define MLA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MLA_HOST_DEVICE inline
#endif
