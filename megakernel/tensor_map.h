// Host side of the copy engine: tensor maps for arbitrary strides, encoded through
// the driver entry point asked for at run time, so that nothing links libcuda.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace mk {

inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static const auto encoder = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        check_cuda(cudaGetDriverEntryPointByVersion(
                       "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
                   "cuTensorMapEncodeTiled");
        if (found != cudaDriverEntryPointSuccess) {
            throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled (needs 12.0)");
        }
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }();
    return encoder;
}

// Innermost dimension first. strides_bytes[i] is the step of dimension i + 1.
template <int kRank>
struct TensorMapSpec {
    CUtensorMapDataType type;
    const void* base;
    std::array<uint64_t, kRank> sizes;
    std::array<uint64_t, kRank - 1> strides_bytes;
    std::array<uint32_t, kRank> box;
    CUtensorMapSwizzle swizzle;
};

template <int kRank>
CUtensorMap encode_tensor_map(const char* name, const TensorMapSpec<kRank>& spec) {
    std::array<uint32_t, kRank> element_strides;
    element_strides.fill(1);
    CUtensorMap map;
    const CUresult status = tensor_map_encoder()(&map,
                                                 spec.type,
                                                 kRank,
                                                 const_cast<void*>(spec.base),
                                                 spec.sizes.data(),
                                                 spec.strides_bytes.data(),
                                                 spec.box.data(),
                                                 element_strides.data(),
                                                 CU_TENSOR_MAP_INTERLEAVE_NONE,
                                                 spec.swizzle,
                                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        throw std::runtime_error(std::string(name) +
                                 ": no tensor map can be made of it (CUresult " +
                                 std::to_string(status) + ")");
    }
    return map;
}

}  // namespace mk
