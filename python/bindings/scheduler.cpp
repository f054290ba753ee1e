// The extension module mla_decode._scheduler: planner, simulator, validator, quality.
// The stub python/mla_decode/_scheduler.pyi documents it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "instructions/layout.h"
#include "scheduler/cost_model.h"
#include "scheduler/errors.h"
#include "scheduler/planner.h"
#include "scheduler/problem.h"
#include "scheduler/quality.h"
#include "scheduler/serialiser.h"
#include "scheduler/simulate.h"
#include "scheduler/validator.h"

namespace py = pybind11;

namespace {

using WordArray = py::array_t<int32_t, py::array::c_style>;

// A list or array of integers, copied: Python may change it while we plan without the GIL.
std::vector<int32_t> to_lengths(const py::object& object) {
    const auto array = py::array::ensure(object);
    if (!array) throw py::type_error("seq_lens: expected a list or array of integers");
    if (array.ndim() != 1) {
        throw py::value_error("seq_lens: expected one dimension, got " +
                              std::to_string(array.ndim()));
    }
    if (array.size() == 0) return {};
    const char kind = array.dtype().kind();
    if (kind != 'i' && kind != 'u') {
        throw py::type_error("seq_lens: expected integers, got dtype " +
                             py::str(array.dtype()).cast<std::string>());
    }
    const auto wide = py::array_t<int64_t, py::array::forcecast>::ensure(array);
    std::vector<int32_t> lengths;
    lengths.reserve(wide.size());
    const auto values = wide.unchecked<1>();
    for (py::ssize_t i = 0; i < values.shape(0); ++i) {
        if (values(i) < std::numeric_limits<int32_t>::min() ||
            values(i) > std::numeric_limits<int32_t>::max()) {
            throw py::value_error("seq_lens[" + std::to_string(i) +
                                  "]: " + std::to_string(values(i)) + " does not fit 32 bits");
        }
        lengths.push_back(static_cast<int32_t>(values(i)));
    }
    return lengths;
}

mla::Queue to_queue(const WordArray& instructions) {
    if (instructions.ndim() != 2 || instructions.shape(1) != mla::kInstructionWords) {
        throw py::value_error("instructions: expected shape [n, " +
                              std::to_string(mla::kInstructionWords) + "]");
    }
    return {instructions.data(), instructions.shape(0)};
}

// Hands a vector's memory to numpy.
template <class T>
py::array_t<T> to_array(std::vector<T> values, std::vector<py::ssize_t> shape) {
    auto* owned = new std::vector<T>(std::move(values));
    py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>(std::move(shape), owned->data(), owner);
}

py::array_t<float> to_float_array(const std::vector<double>& values) {
    const auto size = static_cast<py::ssize_t>(values.size());
    return to_array(std::vector<float>(values.begin(), values.end()), {size});
}

struct PlanData {
    py::array_t<int32_t> instructions;
    py::array_t<int32_t> worker;
    py::array_t<float> start_us;
    py::array_t<float> end_us;
    int num_slots;
    int num_workers;
    double predicted_us;
};

PlanData plan(const py::object& seq_lens,
              int num_heads,
              int new_tokens,
              int num_workers,
              const mla::CostModel& cost,
              const std::string& policy_name,
              int split_tiles) {
    const mla::Problem problem{to_lengths(seq_lens), num_heads, new_tokens, num_workers};
    const mla::Policy policy = mla::parse_policy(policy_name);
    mla::Plan result;
    {
        py::gil_scoped_release unlocked;
        result = mla::plan(problem, cost, policy, split_tiles);
    }
    const py::ssize_t count = result.num_instructions();
    return {to_array(std::move(result.words), {count, mla::kInstructionWords}),
            to_array(std::move(result.worker), {count}),
            to_float_array(result.start_us),
            to_float_array(result.end_us),
            result.num_slots,
            result.num_workers,
            result.predicted_us};
}

void validate(const WordArray& instructions,
              const py::object& seq_lens,
              int num_heads,
              int new_tokens,
              int num_slots,
              std::optional<int64_t> batch) {
    const mla::Queue queue = to_queue(instructions);
    const std::vector<int32_t> lengths = to_lengths(seq_lens);
    mla::validate(queue,
                  lengths,
                  num_heads,
                  new_tokens,
                  num_slots,
                  batch.value_or(static_cast<int64_t>(lengths.size())));
}

py::tuple simulate(const WordArray& instructions,
                   int num_heads,
                   int new_tokens,
                   int num_workers,
                   const mla::CostModel& cost) {
    const mla::Queue queue = to_queue(instructions);
    mla::check_cost_model(cost);
    mla::check_shape(num_heads, new_tokens, num_workers);
    const mla::TaskGraph graph =
        mla::parse_tasks(queue.words, queue.num_instructions, num_heads, new_tokens);
    const mla::Timeline timeline = mla::simulate(graph, mla::queue_order(graph), num_workers, cost);
    const auto count = static_cast<py::ssize_t>(timeline.worker.size());
    return py::make_tuple(to_array(timeline.worker, {count}),
                          to_float_array(timeline.start_us),
                          to_float_array(timeline.end_us),
                          timeline.makespan_us);
}

double get_quality(const std::vector<double>& next_times,
                   int num_processors,
                   int num_tokens,
                   int seq_length) {
    const mla::CostModel cost;
    return mla::quality(next_times,
                        num_processors,
                        num_tokens,
                        seq_length,
                        cost,
                        mla::whole_input_us(mla::kQualityHeads, cost));
}

void set_field(mla::CostModel& cost, const std::string& name, const py::handle& value) {
    for (const mla::CostField& field : mla::kCostFields) {
        if (name != field.name) continue;
        cost.*field.value = value.cast<double>();
        return;
    }
    throw py::value_error("CostModel has no field '" + name + "'");
}

mla::CostModel cost_from_dict(const py::dict& values) {
    mla::CostModel cost;
    for (const auto& [key, value] : values) {
        set_field(cost, key.cast<std::string>(), value);
    }
    mla::check_cost_model(cost);
    return cost;
}

py::dict cost_as_dict(const mla::CostModel& cost) {
    py::dict result;
    for (const mla::CostField& field : mla::kCostFields) result[field.name] = cost.*field.value;
    return result;
}

void bind_cost_model(py::module_& m) {
    py::class_<mla::CostModel> cost(m, "CostModel");
    cost.def(py::init([](const py::kwargs& fields) { return cost_from_dict(fields); }));
    for (const mla::CostField& field : mla::kCostFields) {
        cost.def_readonly(field.name, field.value);
    }
    cost.def("as_dict", &cost_as_dict);
    cost.def_static("from_dict", &cost_from_dict, py::arg("values"));
    cost.def("__eq__", [](const mla::CostModel& self, const py::object& other) {
        return py::isinstance<mla::CostModel>(other) &&
               cost_as_dict(self).equal(cost_as_dict(other.cast<const mla::CostModel&>()));
    });
    cost.attr("__hash__") = py::none();
    cost.def("__repr__", [](const mla::CostModel& self) {
        std::string text = "CostModel(";
        for (const mla::CostField& field : mla::kCostFields) {
            if (text.back() != '(') text += ", ";
            text += std::string(field.name) + "=" +
                    py::repr(py::float_(self.*field.value)).cast<std::string>();
        }
        return text + ")";
    });
    cost.def(py::pickle(&cost_as_dict, &cost_from_dict));
}

void bind_plan_data(py::module_& m) {
    py::class_<PlanData>(m, "PlanData")
        .def_readonly("instructions", &PlanData::instructions)
        .def_readonly("num_slots", &PlanData::num_slots)
        .def_readonly("num_workers", &PlanData::num_workers)
        .def_readonly("predicted_us", &PlanData::predicted_us)
        .def_readonly("worker", &PlanData::worker)
        .def_readonly("start_us", &PlanData::start_us)
        .def_readonly("end_us", &PlanData::end_us);
}

py::dict word_names() {
    py::dict words;
    words["noop"] = py::make_tuple("opcode");
    words["end_of_queue"] = py::make_tuple("opcode");
    words["mla_partial"] = py::make_tuple("opcode",
                                          "uid",
                                          "dst_batch",
                                          "dst_seq",
                                          "q_batch",
                                          "q_seq",
                                          "start",
                                          "end",
                                          "length",
                                          "row_begin",
                                          "num_rows");
    py::list reduction;
    for (const char* name : {"opcode", "uid", "shape", "dst_batch", "dst_seq"}) {
        reduction.append(name);
    }
    for (int i = 0; i < mla::kMaxReductionInputs; ++i) {
        reduction.append("input_" + std::to_string(i));
    }
    words["mla_reduction"] = py::tuple(reduction);
    return words;
}

void bind_constants(py::module_& m) {
    m.attr("INSTRUCTION_WORDS") = mla::kInstructionWords;
    m.attr("QUEUE_VERSION") = mla::kQueueVersion;
    m.attr("OPCODE_END_OF_QUEUE") = static_cast<int>(mla::Opcode::kEndOfQueue);
    m.attr("OPCODE_NOOP") = static_cast<int>(mla::Opcode::kNoop);
    m.attr("OPCODE_MLA_PARTIAL") = static_cast<int>(mla::Opcode::kMlaPartial);
    m.attr("OPCODE_MLA_REDUCTION") = static_cast<int>(mla::Opcode::kMlaReduction);
    m.attr("LATENT_DIM") = mla::kLatentDim;
    m.attr("ROPE_DIM") = mla::kRopeDim;
    m.attr("KV_TILE") = mla::kKvTile;
    m.attr("MAX_ROWS") = mla::kMaxRows;
    m.attr("MAX_REDUCTION_INPUTS") = mla::kMaxReductionInputs;
    m.attr("COLUMN_CHUNK") = mla::kColumnChunk;
    m.attr("MAX_HEADS") = mla::kMaxHeads;
    m.attr("MAX_NEW_TOKENS") = mla::kMaxNewTokens;
    m.attr("MAX_WORKERS") = mla::kMaxWorkers;
    m.attr("WORDS") = word_names();

    py::dict rules;
    for (const mla::Rule& rule : mla::kRules) rules[rule.name] = rule.meaning;
    m.attr("RULES") = rules;
    m.attr("POLICIES") = py::make_tuple("balanced", "backward", "unsplit", "fixed");
}

}  // namespace

PYBIND11_MODULE(_scheduler, m) {
    m.doc() = "Planner, simulator and validator of MLA decode queues (C++).";
    py::register_exception<mla::ScheduleError>(m, "ScheduleError", PyExc_ValueError);
    bind_constants(m);
    bind_cost_model(m);
    bind_plan_data(m);

    m.def("plan",
          &plan,
          py::arg("seq_lens"),
          py::arg("num_heads"),
          py::arg("new_tokens"),
          py::arg("num_workers"),
          py::arg("cost"),
          py::arg("policy") = "balanced",
          py::arg("split_tiles") = 0);
    m.def("validate",
          &validate,
          py::arg("instructions").noconvert(),
          py::arg("seq_lens"),
          py::arg("num_heads"),
          py::arg("new_tokens"),
          py::arg("num_slots"),
          py::arg("batch") = py::none());
    m.def("simulate",
          &simulate,
          py::arg("instructions").noconvert(),
          py::arg("num_heads"),
          py::arg("new_tokens"),
          py::arg("num_workers"),
          py::arg("cost"));
    m.def("get_quality",
          &get_quality,
          py::arg("next_times"),
          py::arg("num_processors"),
          py::arg("num_tokens"),
          py::arg("seq_length"));
}
