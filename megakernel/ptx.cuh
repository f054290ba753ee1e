// The PTX that CUDA C++ and ThunderKittens have no words for. One thin function
// per instruction; section numbers are those of the PTX ISA manual.
#pragma once

#include <cuda.h>  // CUtensorMap
#include <cuda_runtime.h>

#include <cstdint>

namespace mk::ptx {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarrier -------------------------------------------------------------

__device__ __forceinline__ void mbar_init(uint32_t mbar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbar), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbar_invalidate(uint32_t mbar) {
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(mbar) : "memory");
}

// Makes freshly initialised mbarriers visible to the other threads and to the copy engine.
__device__ __forceinline__ void fence_mbar_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbar_arrive(uint32_t mbar, int arrivals = 1) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(mbar),
                 "r"(arrivals)
                 : "memory");
}

// So many bytes more have to come before the phase can end.
__device__ __forceinline__ void mbar_expect_tx(uint32_t mbar, uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(mbar), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void mbar_arrive_expect_tx(uint32_t mbar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(mbar),
                 "r"(bytes)
                 : "memory");
}

// True once the phase of this parity has completed. May suspend the thread for a while, never
// for ever.
__device__ __forceinline__ bool mbar_try_wait(uint32_t mbar, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}\n"
        : "=r"(done)
        : "r"(mbar), "r"(parity)
        : "memory");
    return done != 0;
}

// The same, but never suspends the thread.
__device__ __forceinline__ bool mbar_test_wait(uint32_t mbar, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}\n"
        : "=r"(done)
        : "r"(mbar), "r"(parity)
        : "memory");
    return done != 0;
}

// ---- copies through the asynchronous proxy ---------------------------------

// Orders this thread's ordinary accesses before asynchronous-proxy ones (TMA, wgmma) that follow.
// The one for shared memory does not wait for stores to global memory.
__device__ __forceinline__ void fence_proxy_async_smem() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void fence_proxy_async_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// L2 eviction policies as createpolicy would build them.
inline constexpr uint64_t kEvictNormal = 0x1000000000000000;
inline constexpr uint64_t kEvictFirst = 0x12F0000000000000;
inline constexpr uint64_t kEvictLast = 0x14F0000000000000;

__device__ __forceinline__ void bulk_load(
    uint32_t dst, const void* src, uint32_t bytes, uint32_t mbar, uint64_t policy = kEvictNormal) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;" ::"r"(dst),
        "l"(src),
        "r"(bytes),
        "r"(mbar),
        "l"(policy)
        : "memory");
}

__device__ __forceinline__ void tensor_load_2d(
    uint32_t dst, const CUtensorMap& map, uint32_t mbar, int c0, int c1, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(dst),
        "l"(&map),
        "r"(mbar),
        "r"(c0),
        "r"(c1),
        "l"(policy)
        : "memory");
}

__device__ __forceinline__ void tensor_load_3d(
    uint32_t dst, const CUtensorMap& map, uint32_t mbar, int c0, int c1, int c2, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(dst),
        "l"(&map),
        "r"(mbar),
        "r"(c0),
        "r"(c1),
        "r"(c2),
        "l"(policy)
        : "memory");
}

__device__ __forceinline__ void tensor_load_4d(uint32_t dst,
                                               const CUtensorMap& map,
                                               uint32_t mbar,
                                               int c0,
                                               int c1,
                                               int c2,
                                               int c3,
                                               uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(dst),
        "l"(&map),
        "r"(mbar),
        "r"(c0),
        "r"(c1),
        "r"(c2),
        "r"(c3),
        "l"(policy)
        : "memory");
}

__device__ __forceinline__ void tensor_load_5d(uint32_t dst,
                                               const CUtensorMap& map,
                                               uint32_t mbar,
                                               int c0,
                                               int c1,
                                               int c2,
                                               int c3,
                                               int c4,
                                               uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(dst),
        "l"(&map),
        "r"(mbar),
        "r"(c0),
        "r"(c1),
        "r"(c2),
        "r"(c3),
        "r"(c4),
        "l"(policy)
        : "memory");
}

// To L2 only.
__device__ __forceinline__ void tensor_prefetch_4d(
    const CUtensorMap& map, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(&map),
        "r"(c0),
        "r"(c1),
        "r"(c2),
        "r"(c3)
        : "memory");
}
__device__ __forceinline__ void tensor_prefetch_5d(
    const CUtensorMap& map, int c0, int c1, int c2, int c3, int c4) {
    asm volatile(
        "cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(&map),
        "r"(c0),
        "r"(c1),
        "r"(c2),
        "r"(c3),
        "r"(c4)
        : "memory");
}

__device__ __forceinline__ void bulk_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// The sources of this thread's bulk stores have been read: shared memory may be reused.
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// This thread's bulk stores have been written to global memory.
__device__ __forceinline__ void bulk_wait_written() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// 16 bytes by this thread, through the generic proxy, past L1; nothing if not `wanted`.
__device__ __forceinline__ void copy_16_bytes_if(bool wanted, uint32_t dst, const void* src) {
    asm volatile(
        "{\n"
        ".reg .pred wanted;\n"
        "setp.ne.b32 wanted, %2, 0;\n"
        "@wanted cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n"
        "}\n" ::"r"(dst),
        "l"(src),
        "r"(static_cast<int>(wanted))
        : "memory");
}

// One of the mbarrier's arrivals comes when this thread's copies so far have landed.
__device__ __forceinline__ void arrive_when_copied(uint32_t mbar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(mbar) : "memory");
}

__device__ __forceinline__ uint2 load_smem_uint2(uint32_t address) {
    uint2 value;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(value.x), "=r"(value.y)
                 : "r"(address)
                 : "memory");
    return value;
}

__device__ __forceinline__ float load_smem_float(uint32_t address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}
__device__ __forceinline__ float4 load_smem_float4(uint32_t address) {
    float4 value;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(address)
                 : "memory");
    return value;
}

__device__ __forceinline__ void store_smem_float(uint32_t address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
__device__ __forceinline__ void store_smem_float4(uint32_t address, const float4& value) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "f"(value.x),
                 "f"(value.y),
                 "f"(value.z),
                 "f"(value.w)
                 : "memory");
}

// ---- 8 x 8 matrices of 16-bit elements ------------------------------------------

// A warp's four matrices: lane l gives the place of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t row, uint32_t (&m)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}
// The same, out of registers.
__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&m)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                 "r"(m[0]),
                 "r"(m[1]),
                 "r"(m[2]),
                 "r"(m[3])
                 : "memory");
}
// The same, each transposed.
__device__ __forceinline__ void store_matrices_transposed(uint32_t row, const uint32_t (&m)[4]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
        "r"(m[0]),
        "r"(m[1]),
        "r"(m[2]),
        "r"(m[3])
        : "memory");
}

// ---- global memory ----------------------------------------------------------

__device__ __forceinline__ int32_t load_relaxed_gpu(const int32_t* pointer) {
    int32_t value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
    return value;
}

// What was written before the flag that it reads is seen after it.
__device__ __forceinline__ int32_t load_acquire_gpu(const int32_t* pointer) {
    int32_t value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
    return value;
}

__device__ __forceinline__ void store_float4(float* pointer, const float4& value, uint64_t policy) {
    asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(pointer),
                 "f"(value.x),
                 "f"(value.y),
                 "f"(value.z),
                 "f"(value.w),
                 "l"(policy)
                 : "memory");
}

// 16 bytes in one access, past L1.
__device__ __forceinline__ uint4 load_relaxed_gpu_16_bytes(const void* pointer) {
    uint4 v;
    asm volatile(
        "{\n"
        ".reg .b128 all;\n"
        ".reg .b64 low, high;\n"
        "ld.relaxed.gpu.global.b128 all, [%4];\n"
        "mov.b128 {low, high}, all;\n"
        "mov.b64 {%0, %1}, low;\n"
        "mov.b64 {%2, %3}, high;\n"
        "}"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(pointer)
        : "memory");
    return v;
}
__device__ __forceinline__ void store_relaxed_gpu_16_bytes(void* pointer,
                                                           const uint4& value,
                                                           uint64_t policy) {
    asm volatile(
        "{\n"
        ".reg .b128 all;\n"
        ".reg .b64 low, high;\n"
        "mov.b64 low, {%1, %2};\n"
        "mov.b64 high, {%3, %4};\n"
        "mov.b128 all, {low, high};\n"
        "st.relaxed.gpu.global.L2::cache_hint.b128 [%0], all, %5;\n"
        "}" ::"l"(pointer),
        "r"(value.x),
        "r"(value.y),
        "r"(value.z),
        "r"(value.w),
        "l"(policy)
        : "memory");
}

__device__ __forceinline__ void store_relaxed_gpu(int32_t* pointer, int32_t value) {
    asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}

// Comes after what this thread wrote or saw written before, for the whole GPU. (A fence of both
// kinds would throw away what is in L1, too, and __threadfence() is slower still.)
__device__ __forceinline__ void store_release_gpu(int32_t* pointer, int32_t value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}

// ---- the cluster --------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// The address of the same place in the shared memory of another CTA of the cluster.
__device__ __forceinline__ uint32_t address_at(uint32_t address, uint32_t rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// For what this CTA has read there may now be written something else. (What it wrote itself the
// other CTA need not see.)
__device__ __forceinline__ void mbar_arrive_at(uint32_t mbar_there) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mbar_there) : "memory");
}
// The other CTA sees what this thread wrote, or saw written, wherever it is. That takes a fence of
// the whole GPU.
__device__ __forceinline__ void mbar_release_at(uint32_t mbar_there) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(mbar_there)
                 : "memory");
}

// Sends to another CTA's shared memory; its mbarrier counts the bytes when they are there.
__device__ __forceinline__ void send_float4(uint32_t there,
                                            const float4& value,
                                            uint32_t mbar_there) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
        "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
        "r"(__float_as_uint(value.x)),
        "r"(__float_as_uint(value.y)),
        "r"(__float_as_uint(value.z)),
        "r"(__float_as_uint(value.w)),
        "r"(mbar_there)
        : "memory");
}

// After a wait that a release from another CTA has ended: what was written before it is seen.
__device__ __forceinline__ void fence_acq_rel_cluster() {
    asm volatile("fence.acq_rel.cluster;" ::: "memory");
}

// A barrier of all threads of the cluster, in two steps. Of what was written before it only
// mbarriers' beginnings, with their fence, are seen after it.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- the CTA ------------------------------------------------------------------

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same; true for all if it is for any of them.
__device__ __forceinline__ bool named_barrier_any(int id, int threads, bool mine) {
    uint32_t any;
    asm volatile(
        "{\n"
        ".reg .pred mine, any;\n"
        "setp.ne.u32 mine, %3, 0;\n"
        "barrier.cta.red.or.pred any, %1, %2, mine;\n"
        "selp.u32 %0, 1, 0, any;\n"
        "}\n"
        : "=r"(any)
        : "r"(id), "r"(threads), "r"(static_cast<uint32_t>(mine))
        : "memory");
    return any != 0;
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// True for one lane of a converged warp: ptxas then knows that there is but one.
__device__ __forceinline__ bool elect_lane() {
    uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred elected;\n"
        "elect.sync _|elected, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, elected;\n"
        "}\n"
        : "=r"(elected));
    return elected != 0;
}

// A warpgroup's registers per thread, from what the launch gave it on.
template <int kFrom, int kTo>
__device__ __forceinline__ void move_registers() {
    if constexpr (kTo > kFrom) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kTo));
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kTo));
    }
}

// Programmatic dependent launch. What the kernels before this one wrote may be read after the
// wait; it returns at once when the launch was an ordinary one. Not even a load that the compiler
// takes for one of constants, by a pointer that is passed, comes before it.
template <class... Pointers>
__device__ __forceinline__ void wait_for_earlier_kernels(Pointers&... pointers) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    (..., [](auto& pointer) { asm volatile("" : "+l"(pointer)::"memory"); }(pointers));
}
// The next kernel of the stream may take the SMs that this one leaves, up to its own wait.
__device__ __forceinline__ void allow_next_kernel() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ uint64_t global_time_ns() {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

// threadIdx.x, read anew each time: one instruction instead of a register held through a loop.
__device__ __forceinline__ int thread_in_cta() {
    int id;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
    __builtin_assume(0 <= id && id < 1024);
    return id;
}

// The condition, but the compiler knows nothing of it, and so leaves a branch on it as it is
// written: what comes first is placed first. Code that is not executed costs where it is in the
// way.
__device__ __forceinline__ bool as_written(bool condition) {
    int value = condition ? 1 : 0;
    asm volatile("" : "+r"(value));
    return value != 0;
}

__device__ __forceinline__ uint32_t sm_id() {
    uint32_t id;
    asm("mov.u32 %0, %%smid;" : "=r"(id));
    return id;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace mk::ptx
