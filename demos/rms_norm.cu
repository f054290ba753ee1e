// Python module demos._rms_norm: a megakernel with two opcodes, no-op and RMS-norm.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "demos/rms_norm.cuh"
#include "megakernel/launch.h"

namespace py = pybind11;

namespace {

using Config = mk::DefaultConfig;
using RmsNorm = demo::RmsNorm<Config>;
using Ops = mk::OpcodeList<RmsNorm, mk::Noop>;

constexpr int kMaxRows = RmsNorm::kPages * RmsNorm::kTileRows;
constexpr int kMaxCols = Config::kSmemPageBytes / RmsNorm::kTileRows / sizeof(float);

// Addresses are those of device tensors: instructions int32 [num_instructions, 32], queue_state
// int32 [32] and done_flags int32, both zeroed once and then left alone, x and weights fp32 as in
// RmsNormGlobals. num_ctas 0 is one per SM.
void run(uintptr_t instructions,
         int num_instructions,
         uintptr_t queue_state,
         uintptr_t x,
         uintptr_t weights,
         uintptr_t done_flags,
         int64_t num_rows,
         int num_cols,
         float eps,
         int num_ctas,
         uintptr_t stream,
         int device) {
    if (num_cols % 4 != 0 || num_cols < 0 || num_cols > kMaxCols) {
        throw std::invalid_argument("num_cols: expected a multiple of 4 up to " +
                                    std::to_string(kMaxCols) + ", got " + std::to_string(num_cols));
    }
    const mk::DeviceGuard guard(device);
    demo::RmsNormGlobals g{};
    g.megakernel.instructions = reinterpret_cast<const int32_t*>(instructions);
    g.megakernel.num_instructions = num_instructions;
    g.megakernel.queue = reinterpret_cast<mk::QueueState*>(queue_state);
    g.megakernel.failure = mk::FailureRecords::device(device);
    g.megakernel.timeout_us = 2'000'000;
    g.x = reinterpret_cast<float*>(x);
    g.weights = reinterpret_cast<const float*>(weights);
    g.done_flags = reinterpret_cast<int32_t*>(done_flags);
    g.num_rows = num_rows;
    g.num_cols = num_cols;
    g.eps = eps;
    mk::launch<Config, Ops>(g,
                            mk::Grid{num_ctas > 0 ? num_ctas : mk::num_sms(device)},
                            device,
                            reinterpret_cast<cudaStream_t>(stream));
}

// Empty, or what a launch on this device reported since the last call.
std::string take_error(int device) {
    const auto record = mk::FailureRecords::take(device);
    if (!record) return "";
    return "SM " + std::to_string(record->sm) + ", instruction " +
           std::to_string(record->instruction) + ": wait of kind " +
           std::to_string(record->wait_kind) + " on " + std::to_string(record->index) +
           " expired, expected " + std::to_string(record->expected) + ", seen " +
           std::to_string(record->seen);
}

}  // namespace

PYBIND11_MODULE(_rms_norm, m) {
    m.doc() = "The tutorial megakernel (sm_90a): no-op and RMS-norm.";
    m.attr("INSTRUCTION_WORDS") = mk::kInstructionWords;
    m.attr("QUEUE_STATE_WORDS") = mk::kQueueStateWords;
    m.attr("OPCODE_NOOP") = mk::Noop::kOpcode;
    m.attr("OPCODE_RMS_NORM") = RmsNorm::kOpcode;
    m.attr("MAX_ROWS") = kMaxRows;
    m.attr("MAX_COLS") = kMaxCols;
    m.def("available", &mk::why_unavailable, py::arg("device") = 0);
    m.def("num_sms", &mk::num_sms, py::arg("device") = 0);
    m.def("take_error", &take_error, py::arg("device") = 0);
    m.def("run",
          &run,
          py::arg("instructions"),
          py::arg("num_instructions"),
          py::arg("queue_state"),
          py::arg("x"),
          py::arg("weights"),
          py::arg("done_flags"),
          py::arg("num_rows"),
          py::arg("num_cols"),
          py::arg("eps"),
          py::arg("num_ctas"),
          py::arg("stream"),
          py::arg("device"));
}
