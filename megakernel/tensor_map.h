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

// A function of CUDA 12.0's driver.
template <class Function>
Function driver_function(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check_cuda(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found),
               name);
    if (found != cudaDriverEntryPointSuccess) {
        throw std::runtime_error(std::string("the CUDA driver has no ") + name + " (needs 12.0)");
    }
    return reinterpret_cast<Function>(function);
}

inline void check_tensor_map(const char* name, CUresult status) {
    if (status != CUDA_SUCCESS) {
        throw std::runtime_error(std::string(name) +
                                 ": no tensor map can be made of it (CUresult " +
                                 std::to_string(status) + ")");
    }
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
    static const auto encode =
        driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled");
    CUtensorMap map;
    check_tensor_map(name,
                     encode(&map,
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
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
    return map;
}

// The same tensor, elsewhere.
inline void move_tensor_map(const char* name, CUtensorMap& map, const void* base) {
    static const auto replace =
        driver_function<PFN_cuTensorMapReplaceAddress_v12000>("cuTensorMapReplaceAddress");
    check_tensor_map(name, replace(&map, const_cast<void*>(base)));
}

}  // namespace mk
