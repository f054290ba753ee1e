// The device planner on the host, for CPU tensors and for tests: one thread as the team.
#include "python/bindings/device_plan.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "scheduler/device_plan_host.h"

namespace py = pybind11;

namespace {

using IntArray = py::array_t<int32_t, py::array::c_style>;

py::tuple capacity(int num_requests,
                   int num_kv_heads,
                   int s_q,
                   int total_tokens,
                   int num_heads,
                   int max_seq_len,
                   int num_workers,
                   int split_tiles,
                   int group_rows) {
    const auto problem = mla::device_plan_problem(num_requests,
                                                  num_kv_heads,
                                                  s_q,
                                                  total_tokens,
                                                  num_heads,
                                                  max_seq_len,
                                                  num_workers,
                                                  split_tiles,
                                                  /*cluster_ctas=*/1,
                                                  group_rows);
    return py::make_tuple(mla::device_plan_rows(problem), mla::device_plan_capacity(problem).slots);
}

void plan(const IntArray& seq_lens,
          const py::object& cu_seqlens_q,
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
          IntArray& instructions,
          IntArray& header) {
    auto problem = mla::device_plan_problem(static_cast<int>(seq_lens.size()),
                                            num_kv_heads,
                                            s_q,
                                            total_tokens,
                                            num_heads,
                                            max_seq_len,
                                            num_workers,
                                            split_tiles,
                                            cluster_ctas,
                                            group_rows);
    problem.cost = mla::device_plan_cost(cost);
    problem.seq_lens = seq_lens.data();
    IntArray cu_seqlens;
    if (!cu_seqlens_q.is_none()) {
        cu_seqlens = cu_seqlens_q.cast<IntArray>();
        if (cu_seqlens.size() != seq_lens.size() + 1) {
            throw py::value_error("cu_seqlens_q: expected " + std::to_string(seq_lens.size() + 1) +
                                  " numbers, got " + std::to_string(cu_seqlens.size()));
        }
        problem.cu_seqlens_q = cu_seqlens.data();
    }
    if (instructions.size() < mla::device_plan_rows(problem) * mla::kInstructionWords ||
        header.size() < mla::kDevicePlanHeaderWords) {
        throw py::value_error("instructions, header: too small for a plan of these sizes");
    }
    problem = mla::with_constants(problem);
    const std::unique_ptr<unsigned char[]> memory(
        new unsigned char[mla::device_plan_layout(problem, nullptr, nullptr)]);
    mla::DevicePlanState state;
    mla::device_plan_layout(problem, memory.get(), &state);
    const mla::TeamOfOne team;
    mla::DevicePlanner<mla::TeamOfOne>(team, problem, state)
        .run(instructions.mutable_data(), header.mutable_data());
}

}  // namespace

void bind_device_plan(py::module_& m) {
    m.attr("DEVICE_PLAN_HEADER_WORDS") = static_cast<int>(mla::kDevicePlanHeaderWords);
    m.def("device_plan_capacity",
          &capacity,
          py::kw_only(),
          py::arg("num_requests"),
          py::arg("num_kv_heads"),
          py::arg("s_q"),
          py::arg("total_tokens"),
          py::arg("num_heads"),
          py::arg("max_seq_len"),
          py::arg("num_workers"),
          py::arg("split_tiles"),
          py::arg("group_rows") = mla::kMaxRows);
    m.def("device_plan",
          &plan,
          py::kw_only(),
          py::arg("seq_lens"),
          py::arg("cu_seqlens_q"),
          py::arg("num_kv_heads"),
          py::arg("s_q"),
          py::arg("total_tokens"),
          py::arg("num_heads"),
          py::arg("max_seq_len"),
          py::arg("num_workers"),
          py::arg("split_tiles"),
          py::arg("cluster_ctas"),
          py::arg("group_rows") = mla::kMaxRows,
          py::arg("cost"),
          py::arg("instructions"),
          py::arg("header"));
}
