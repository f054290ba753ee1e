// Python module tests._late_write: a kernel that lets the next one of its stream come up at once,
// and writes what that one reads some time later.
#include <pybind11/pybind11.h>

#include "megakernel/launch.h"

namespace {

__global__ void write_late(int32_t* to, const int32_t* from, int count, uint64_t after_ns) {
    mk::ptx::allow_next_kernel();
    const uint64_t begin = mk::ptx::global_time_ns();
    while (mk::ptx::global_time_ns() - begin < after_ns) __nanosleep(1000);
    for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

// Addresses are those of int32 device tensors of `count` elements.
void run(uintptr_t to, uintptr_t from, int count, uint64_t after_ns, uintptr_t stream, int device) {
    const mk::DeviceGuard guard(device);
    write_late<<<1, 256, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
        reinterpret_cast<int32_t*>(to), reinterpret_cast<const int32_t*>(from), count, after_ns);
    mk::check_cuda(cudaGetLastError(), "late write");
}

}  // namespace

PYBIND11_MODULE(_late_write, m) {
    m.doc() = "A kernel that writes late (sm_90a).";
    m.def("run", &run);
}
