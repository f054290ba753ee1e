// Python module mla_decode._kernels: tensors come as (address, sizes, strides), so
// neither torch nor libpython nor libcuda is linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "instructions/mla_decode.cuh"

namespace py = pybind11;

namespace {

// data_ptr, sizes, strides in elements
using TensorRef = std::tuple<uintptr_t, std::vector<int64_t>, std::vector<int64_t>>;

mla::Tensor tensor(const TensorRef& ref) {
    return {reinterpret_cast<void*>(std::get<0>(ref)), std::get<1>(ref), std::get<2>(ref)};
}
mla::Tensor tensor(const std::optional<TensorRef>& ref) {
    return ref ? tensor(*ref) : mla::Tensor{};
}

void mla_decode(const TensorRef& instructions,
                const std::optional<TensorRef>& timings,
                const TensorRef& queue_state,
                const TensorRef& q_rot,
                const TensorRef& q_v,
                const TensorRef& k_rot,
                const TensorRef& v,
                const TensorRef& table,
                const TensorRef& o,
                const TensorRef& o_scratch,
                const TensorRef& lvec_scratch,
                const TensorRef& completion_flag,
                float softmax_scale,
                int tic,
                const std::optional<TensorRef>& lse,
                uintptr_t stream,
                int num_ctas,
                uint64_t spin_timeout_ns,
                int device) {
    mla::DecodeArgs args;
    args.instructions = tensor(instructions);
    args.timings = tensor(timings);
    args.queue_state = tensor(queue_state);
    args.q_rot = tensor(q_rot);
    args.q_v = tensor(q_v);
    args.k_rot = tensor(k_rot);
    args.v = tensor(v);
    args.table = tensor(table);
    args.o = tensor(o);
    args.o_scratch = tensor(o_scratch);
    args.lvec_scratch = tensor(lvec_scratch);
    args.completion_flag = tensor(completion_flag);
    args.lse = tensor(lse);
    args.softmax_scale = softmax_scale;
    args.tic = tic;
    args.num_ctas = num_ctas;
    args.timeout_us = static_cast<uint32_t>(std::min<uint64_t>(spin_timeout_ns / 1000, 1u << 30));
    args.device = device;
    args.stream = reinterpret_cast<cudaStream_t>(stream);
    mla::launch_decode(args);
}

std::string describe_wait(const mk::FailureRecord& record) {
    const std::string index = std::to_string(record.index);
    switch (static_cast<mk::WaitKind>(record.wait_kind)) {
        case mk::WaitKind::kInstruction:
            return "the next instruction, ring slot " + index;
        case mk::WaitKind::kRetired:
            return "ring slot " + index + " to be free";
        case mk::WaitKind::kPrefetchGate:
            return "the loads of ring slot " + index;
        case mk::WaitKind::kPage:
            return "shared-memory page " + index;
        case mk::WaitKind::kSemaphore:
            return "semaphore " + index;
        case mk::WaitKind::kDoneFlag:
            return "completion flag of scratch slot " + index;
        case mk::WaitKind::kBadOpcode:
            return "an opcode that the kernel knows";
    }
    return "unknown";
}

py::object take_error(int device) {
    const auto record = mk::FailureRecords::take(device);
    if (!record) return py::none();
    static constexpr const char* kRoles[] = {
        "consumer", "controller", "loader", "storer", "launcher"};
    py::dict error;
    error["sm"] = record->sm;
    error["role"] = kRoles[record->role % 5];
    error["instruction"] = record->instruction;
    error["uid"] = record->uid;
    error["opcode"] = record->opcode;
    error["wait"] = describe_wait(*record);
    error["expected"] = record->expected;
    error["seen"] = record->seen;
    return error;
}

std::string device_name(int device) {
    cudaDeviceProp properties;
    mk::check_cuda(cudaGetDeviceProperties(&properties, device), "device name");
    return properties.name;
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
    m.doc() = "The MLA decode megakernel (sm_90a).";
    m.attr("QUEUE_STATE_WORDS") = mk::kQueueStateWords;
    m.attr("TIMING_WORDS") = mk::kTimingWords;
    m.def("available", &mk::why_unavailable, py::arg("device") = 0);
    m.def("num_sms", &mk::num_sms, py::arg("device") = 0);
    m.def("device_name", &device_name, py::arg("device") = 0);
    m.def("take_error", &take_error, py::arg("device") = 0);
    m.def("mla_decode",
          &mla_decode,
          py::arg("instructions"),
          py::arg("timings"),
          py::arg("queue_state"),
          py::arg("q_rot"),
          py::arg("q_v"),
          py::arg("k_rot"),
          py::arg("v"),
          py::arg("table"),
          py::arg("o"),
          py::arg("o_scratch"),
          py::arg("lvec_scratch"),
          py::arg("completion_flag"),
          py::arg("softmax_scale"),
          py::arg("tic"),
          py::arg("lse"),
          py::arg("stream"),
          py::arg("num_ctas"),
          py::arg("spin_timeout_ns"),
          py::arg("device"));
}
