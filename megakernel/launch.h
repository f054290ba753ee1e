// Host side of a launch: which devices can run a megakernel, the pinned failure
// record, and the launch itself.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "megakernel/megakernel.cuh"
#include "megakernel/tensor_map.h"

namespace mk {

// Empty when this machine can run megakernels, else what it lacks.
inline std::string why_unavailable(int device) {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no CUDA driver";
    if (driver < CUDART_VERSION / 1000 * 1000) {
        return "CUDA driver " + std::to_string(driver / 1000) + "." +
               std::to_string(driver % 1000 / 10) + " is older than the runtime's " +
               std::to_string(CUDART_VERSION / 1000) + ".0";
    }
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return "no CUDA device";
    if (device < 0 || device >= count) return "no CUDA device " + std::to_string(device);
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (major != 9 || minor != 0) {
        return "compute capability " + std::to_string(major) + "." + std::to_string(minor) +
               ", needs 9.0 (Hopper)";
    }
    return "";
}

inline int num_sms(int device) {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
               "multiprocessor count");
    return count;
}

class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check_cuda(cudaGetDevice(&previous_), "current device");
        changed_ = device != previous_;
        if (changed_) check_cuda(cudaSetDevice(device), "set device");
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
    bool changed_ = false;
};

// One record per device in pinned host memory: kernels write it when a watchdog ends them, the
// host looks without synchronising.
class FailureRecords {
  public:
    static FailureRecord* host(int device) { return entry(device).host; }
    static FailureRecord* device(int device) { return entry(device).device; }

    static std::optional<FailureRecord> take(int device) {
        volatile FailureRecord* record = host(device);
        if (record->valid != 1) return std::nullopt;
        FailureRecord copy = *const_cast<FailureRecord*>(host(device));
        record->valid = 0;
        return copy;
    }

  private:
    struct Entry {
        FailureRecord* host = nullptr;
        FailureRecord* device = nullptr;
    };
    static Entry entry(int device) {
        static std::mutex mutex;
        static std::vector<Entry> entries;
        const std::lock_guard<std::mutex> lock(mutex);
        if (device >= static_cast<int>(entries.size())) entries.resize(device + 1);
        Entry& entry = entries[device];
        if (entry.host == nullptr) {
            const DeviceGuard guard(device);
            void* host = nullptr;
            check_cuda(cudaHostAlloc(&host, sizeof(FailureRecord), cudaHostAllocMapped),
                       "failure record");
            *static_cast<FailureRecord*>(host) = {};
            void* mapped = nullptr;
            check_cuda(cudaHostGetDevicePointer(&mapped, host, 0), "failure record");
            entry = {static_cast<FailureRecord*>(host), static_cast<FailureRecord*>(mapped)};
        }
        return entry;
    }
};

// Clusters of so many CTAs that the device can run at a time. (Which SMs make one depends on which
// of them a chip has lost, so that clusters of four or more may leave some idle.)
template <class Config, class Ops, class Globals>
int max_clusters(int cluster_ctas, int device) {
    const DeviceGuard guard(device);
    const auto kernel = megakernel<Config, Ops, Globals>;
    constexpr int kSmemBytes = SmemLayout<Config>::kTotalBytes;
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
        "shared memory of a CTA");
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(cluster_ctas), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(cluster_ctas);
    config.blockDim = dim3(kNumThreads<Config>);
    config.dynamicSmemBytes = kSmemBytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    int count = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "clusters at a time");
    return count;
}

// Persistent CTAs, one per SM at most, and how many make a cluster.
struct Grid {
    int num_ctas;
    int cluster_ctas = 1;
};

// Enqueues one megakernel.
template <class Config, class Ops, class Globals>
void launch(const Globals& globals, Grid grid, int device, cudaStream_t stream) {
    const auto kernel = megakernel<Config, Ops, Globals>;
    constexpr int kSmemBytes = SmemLayout<Config>::kTotalBytes;
    static std::mutex mutex;
    static std::vector<bool> prepared;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        if (device >= static_cast<int>(prepared.size())) prepared.resize(device + 1);
        if (!prepared[device]) {
            check_cuda(cudaFuncSetAttribute(
                           kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
                       "shared memory of a CTA");
            prepared[device] = true;
        }
    }
    // Its CTAs may come up while the last kernel of the stream drains: they wait for it before
    // they read anything.
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(grid.cluster_ctas), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid.num_ctas);
    config.blockDim = dim3(kNumThreads<Config>);
    config.dynamicSmemBytes = kSmemBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    check_cuda(cudaLaunchKernelEx(&config, kernel, globals), "megakernel launch");
}

}  // namespace mk
