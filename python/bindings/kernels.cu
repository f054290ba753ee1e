// Python module mla_decode._kernels: addresses come as integers, so neither torch nor
// libpython nor libcuda is linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "instructions/mla_decode.cuh"
#include "python/bindings/device_plan.h"
#include "python/bindings/tensor_reader.h"
#include "scheduler/device_plan.cuh"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

mla::Decoder make_decoder(bool fp16,
                          int num_heads,
                          int h_kv,
                          int num_requests,
                          int s_q,
                          int total_tokens,
                          int64_t q_nope_row_stride,
                          int64_t q_pe_row_stride,
                          int num_blocks,
                          int block_size,
                          const std::array<int64_t, 3>& latent_strides,
                          const std::array<int64_t, 3>& rope_strides,
                          int table_stride,
                          const std::array<int64_t, 3>& lse_strides,
                          int slot_rows,
                          float softmax_scale,
                          bool causal,
                          bool lse_base2,
                          float lse_empty,
                          int device) {
    mla::DecodeLayout layout;
    layout.fp16 = fp16;
    layout.num_heads = num_heads;
    layout.num_kv_heads = h_kv;
    layout.num_requests = num_requests;
    layout.s_q = s_q;
    layout.total_tokens = total_tokens;
    layout.q_nope_row_stride = q_nope_row_stride;
    layout.q_pe_row_stride = q_pe_row_stride;
    layout.num_blocks = num_blocks;
    layout.block_size = block_size;
    layout.latent_strides = latent_strides;
    layout.rope_strides = rope_strides;
    layout.table_stride = table_stride;
    layout.lse_strides = lse_strides;
    layout.slot_rows = slot_rows;
    layout.softmax_scale = softmax_scale;
    layout.causal = causal;
    layout.lse_base2 = lse_base2;
    layout.lse_empty = lse_empty;
    layout.device = device;
    return mla::Decoder(layout);
}

void plan(uintptr_t seq_lens,
          uintptr_t cu_seqlens_q,
          uintptr_t kv_indptr,
          int block_size,
          int num_requests,
          int num_kv_heads,
          int s_q,
          int total_tokens,
          int num_heads,
          int max_seq_len,
          int num_workers,
          int split_tiles,
          int cluster_ctas,
          int group_rows,
          const std::vector<double>& cost,
          uintptr_t instructions,
          int64_t rows,
          uintptr_t header,
          int device,
          uintptr_t stream) {
    auto problem = mla::device_plan_problem(num_requests,
                                            num_kv_heads,
                                            s_q,
                                            total_tokens,
                                            num_heads,
                                            max_seq_len,
                                            num_workers,
                                            split_tiles,
                                            cluster_ctas,
                                            group_rows);
    problem.seq_lens = pointer<const int32_t>(seq_lens);
    problem.cu_seqlens_q = pointer<const int32_t>(cu_seqlens_q);
    problem.kv_indptr = pointer<const int32_t>(kv_indptr);
    problem.block_size = block_size;
    problem.cost = mla::device_plan_cost(cost);
    mla::launch_device_plan(problem,
                            pointer<int32_t>(instructions),
                            rows,
                            pointer<int32_t>(header),
                            device,
                            reinterpret_cast<cudaStream_t>(stream));
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
        case mk::WaitKind::kCluster:
            return "other CTAs of the cluster, barrier " + index;
        case mk::WaitKind::kBadLength:
            break;  // no wait
    }
    return "unknown";
}

py::object take_error(int device) {
    const auto record = mk::FailureRecords::take(device);
    if (!record) return py::none();
    py::dict error;
    error["expected"] = record->expected;
    error["seen"] = record->seen;
    if (static_cast<mk::WaitKind>(record->wait_kind) == mk::WaitKind::kBadLength) {
        error["kind"] = "length";
        error["request"] = record->index;
        return error;
    }
    static constexpr const char* kRoles[] = {
        "consumer", "controller", "loader", "storer", "launcher"};
    error["kind"] = "timeout";
    error["sm"] = record->sm;
    error["role"] = kRoles[record->role % 5];
    error["instruction"] = record->instruction;
    error["uid"] = record->uid;
    error["opcode"] = record->opcode;
    error["wait"] = describe_wait(*record);
    return error;
}

// A queue and its scratch, for calls of one layout.
class BoundDecode {
  public:
    BoundDecode(mla::Decoder& decoder,
                uintptr_t instructions,
                int num_instructions,
                bool instructions_are_constant,
                uintptr_t timings,
                uintptr_t queue_state,
                uintptr_t o_scratch,
                uintptr_t lvec_scratch,
                uintptr_t completion_flag,
                int tic,
                int num_ctas,
                int cluster_ctas,
                uint64_t spin_timeout_ns)
        : decoder_(decoder) {
        pointers_.instructions = pointer<void>(instructions);
        pointers_.num_instructions = num_instructions;
        pointers_.timings = pointer<void>(timings);
        pointers_.queue_state = pointer<void>(queue_state);
        pointers_.o_scratch = pointer<void>(o_scratch);
        pointers_.lse_log2_scratch = pointer<void>(lvec_scratch);
        pointers_.done_flags = pointer<void>(completion_flag);
        options_.instructions_are_constant = instructions_are_constant;
        options_.tic = tic;
        options_.grid = {num_ctas, cluster_ctas};
        options_.timeout_us =
            static_cast<uint32_t>(std::min<uint64_t>(spin_timeout_ns / 1000, 1u << 30));
    }

    void enqueue(const py::tuple& tensors, uintptr_t out, uintptr_t lse, uintptr_t stream) {
        if (tensors.size() != 8) throw py::value_error("tensors: expected 8 addresses");
        const auto address = [&](int i) {
            return PyLong_AsVoidPtr(PyTuple_GET_ITEM(tensors.ptr(), i));
        };
        pointers_.q_nope = address(0);
        pointers_.q_pe = address(1);
        pointers_.latent = address(2);
        pointers_.rope = address(3);
        pointers_.block_ids = address(4);
        pointers_.kv_indptr = address(5);
        pointers_.cu_seqlens_q = address(6);
        pointers_.attn_sink = address(7);
        if (PyErr_Occurred()) throw py::error_already_set();
        pointers_.out = pointer<void>(out);
        pointers_.lse = pointer<void>(lse);
        options_.stream = reinterpret_cast<cudaStream_t>(stream);
        decoder_.launch(pointers_, options_);
    }

  private:
    mla::Decoder& decoder_;
    mla::DecodePointers pointers_{};
    mla::LaunchOptions options_;
};

std::string device_name(int device) {
    cudaDeviceProp properties;
    mk::check_cuda(cudaGetDeviceProperties(&properties, device), "device name");
    return properties.name;
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
    m.doc() = "The MLA decode megakernel and its planner (sm_90a).";
    m.attr("QUEUE_STATE_WORDS") = mk::kQueueStateWords;
    m.attr("TIMING_WORDS") = mk::kTimingWords;
    m.def("available", &mk::why_unavailable, py::arg("device") = 0);
    m.def("num_sms", &mk::num_sms, py::arg("device") = 0);
    m.def("max_clusters", &mla::max_clusters, py::arg("cluster_ctas"), py::arg("device") = 0);
    m.def("device_name", &device_name, py::arg("device") = 0);
    m.def("take_error", &take_error, py::arg("device") = 0);
    m.def("plan", &plan);
    py::class_<mla::Decoder>(m, "DecodeLayout")
        .def(py::init(&make_decoder),
             py::kw_only(),
             py::arg("fp16"),
             py::arg("num_heads"),
             py::arg("h_kv"),
             py::arg("num_requests"),
             py::arg("s_q"),
             py::arg("total_tokens"),
             py::arg("q_nope_row_stride"),
             py::arg("q_pe_row_stride"),
             py::arg("num_blocks"),
             py::arg("block_size"),
             py::arg("latent_strides"),
             py::arg("rope_strides"),
             py::arg("table_stride"),
             py::arg("lse_strides"),
             py::arg("slot_rows"),
             py::arg("softmax_scale"),
             py::arg("causal"),
             py::arg("lse_base2"),
             py::arg("lse_empty"),
             py::arg("device"));
    py::class_<BoundDecode>(m, "BoundDecode")
        .def(py::init<mla::Decoder&,
                      uintptr_t,
                      int,
                      bool,
                      uintptr_t,
                      uintptr_t,
                      uintptr_t,
                      uintptr_t,
                      uintptr_t,
                      int,
                      int,
                      int,
                      uint64_t>(),
             py::keep_alive<1, 2>(),
             py::arg("layout"),
             py::kw_only(),
             py::arg("instructions"),
             py::arg("num_instructions"),
             py::arg("instructions_are_constant"),
             py::arg("timings"),
             py::arg("queue_state"),
             py::arg("o_scratch"),
             py::arg("lvec_scratch"),
             py::arg("completion_flag"),
             py::arg("tic"),
             py::arg("num_ctas"),
             py::arg("cluster_ctas"),
             py::arg("spin_timeout_ns"))
        .def("enqueue", &BoundDecode::enqueue);
    py::class_<mla::TensorReader>(m, "TensorReader")
        .def(py::init<const py::type&>())
        .def("read", &mla::TensorReader::read);
}
