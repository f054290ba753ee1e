// Python module benchmarks._stream: a persistent kernel that brings bytes into shared memory and
// does nothing with them. No kernel that reads its input once can be faster.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

#include "megakernel/launch.h"
#include "megakernel/ptx.cuh"

namespace {

constexpr int kChunkBytes = 12 * 1024;
constexpr int kPlaces = 18;  // 216 KiB on their way to each SM
constexpr int kThreads = 32;

// CTA c takes the chunks c, c + gridDim.x, ...
__global__ void __launch_bounds__(kThreads, 1) stream_bytes(const char* from, int64_t num_bytes) {
    extern __shared__ __align__(128) unsigned char smem[];
    __shared__ uint64_t arrived[kPlaces];
    mk::ptx::allow_next_kernel();
    if (threadIdx.x == 0) {
        for (auto& barrier : arrived) mk::ptx::mbar_init(mk::ptx::smem_address(&barrier), 1);
        mk::ptx::fence_mbar_init();
    }
    mk::ptx::wait_for_earlier_kernels();
    if (threadIdx.x != 0) return;
    const auto begin = [](int64_t chunk) {
        return (blockIdx.x + chunk * gridDim.x) * int64_t{kChunkBytes};
    };
    const auto ask = [&](int64_t chunk) {
        const int place = static_cast<int>(chunk % kPlaces);
        const uint32_t barrier = mk::ptx::smem_address(&arrived[place]);
        const auto bytes =
            static_cast<uint32_t>(min(int64_t{kChunkBytes}, num_bytes - begin(chunk)));
        mk::ptx::mbar_arrive_expect_tx(barrier, bytes);
        mk::ptx::bulk_load(mk::ptx::smem_address(smem) + place * kChunkBytes,
                           from + begin(chunk),
                           bytes,
                           barrier,
                           mk::ptx::kEvictFirst);
    };
    for (int64_t chunk = 0; chunk < kPlaces && begin(chunk) < num_bytes; ++chunk) ask(chunk);
    for (int64_t chunk = 0; begin(chunk) < num_bytes; ++chunk) {
        const uint32_t barrier = mk::ptx::smem_address(&arrived[chunk % kPlaces]);
        while (!mk::ptx::mbar_try_wait(barrier, static_cast<uint32_t>(chunk / kPlaces & 1))) {
        }
        if (begin(chunk + kPlaces) < num_bytes) ask(chunk + kPlaces);
    }
}

// Enqueues a launch that reads [address, address + num_bytes), both multiples of 16, on all SMs.
void stream(uintptr_t address, int64_t num_bytes, int device, uintptr_t stream) {
    if (address % 16 != 0 || num_bytes < 0 || num_bytes % 16 != 0) {
        throw pybind11::value_error("address, num_bytes: expected multiples of 16");
    }
    const mk::DeviceGuard guard(device);
    constexpr int kSmemBytes = kPlaces * kChunkBytes;
    mk::check_cuda(
        cudaFuncSetAttribute(stream_bytes, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
        "shared memory of a CTA");
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(mk::num_sms(device));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kSmemBytes;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &overlap;
    config.numAttrs = 1;
    mk::check_cuda(cudaLaunchKernelEx(
                       &config, stream_bytes, reinterpret_cast<const char*>(address), num_bytes),
                   "stream launch");
}

}  // namespace

PYBIND11_MODULE(_stream, m) {
    m.doc() = "A kernel that streams bytes into shared memory (sm_90a).";
    m.def("available", &mk::why_unavailable, pybind11::arg("device") = 0);
    m.def("stream", &stream);
}
