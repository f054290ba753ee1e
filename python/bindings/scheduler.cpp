// The extension module mla_decode._scheduler: planner, simulator, validator, quality.
// The stub python/mla_decode/_scheduler.pyi documents it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "instructions/layout.h"
#include "scheduler/batch.h"
#include "scheduler/cost_model.h"
#include "scheduler/errors.h"
#include "scheduler/planner.h"
#include "scheduler/quality.h"
#include "scheduler/serialiser.h"
#include "scheduler/simulate.h"
#include "scheduler/validator.h"

namespace py = pybind11;

// In device_plan.cpp.
void bind_device_plan(py::module_& m);

namespace {

using WordArray = py::array_t<int32_t, py::array::c_style>;

// A list or array of integers, copied: Python may change it while we plan without the GIL.
std::vector<int32_t> to_integers(const std::string& name, const py::object& object) {
    const auto array = py::array::ensure(object);
    if (!array) throw py::type_error(name + ": expected a list or array of integers");
    if (array.ndim() != 1) {
        throw py::value_error(name + ": expected one dimension, got " +
                              std::to_string(array.ndim()));
    }
    if (array.size() == 0) return {};
    const char kind = array.dtype().kind();
    if (kind != 'i' && kind != 'u') {
        throw py::type_error(name + ": expected integers, got dtype " +
                             py::str(array.dtype()).cast<std::string>());
    }
    const auto wide = py::array_t<int64_t, py::array::forcecast>::ensure(array);
    std::vector<int32_t> integers;
    integers.reserve(wide.size());
    const auto values = wide.unchecked<1>();
    for (py::ssize_t i = 0; i < values.shape(0); ++i) {
        if (values(i) < std::numeric_limits<int32_t>::min() ||
            values(i) > std::numeric_limits<int32_t>::max()) {
            throw py::value_error(name + "[" + std::to_string(i) +
                                  "]: " + std::to_string(values(i)) + " does not fit 32 bits");
        }
        integers.push_back(static_cast<int32_t>(values(i)));
    }
    return integers;
}

// One number for all sequences, or one for each.
mla::NewTokens to_new_tokens(const py::object& object) {
    mla::NewTokens tokens;
    if (py::isinstance<py::array>(object) || py::isinstance<py::sequence>(object)) {
        tokens.each = to_integers("new_tokens", object);
        for (size_t i = 0; i < tokens.each.size(); ++i) {
            const int32_t count = tokens.each[i];
            if (0 <= count && count <= mla::kMaxNewTokens) continue;
            mla::check_range("new_tokens[" + std::to_string(i) + "]", count, 0, mla::kMaxNewTokens);
        }
        return tokens;
    }
    int64_t uniform = 0;
    try {
        uniform = object.cast<int64_t>();
    } catch (const py::cast_error&) {
        throw py::type_error("new_tokens: expected an integer, or a list or array of them");
    }
    mla::check_range("new_tokens", uniform, 1, mla::kMaxNewTokens);
    tokens.uniform = static_cast<int32_t>(uniform);
    return tokens;
}

mla::Batch to_batch(const py::object& seq_lens,
                    int num_heads,
                    const py::object& new_tokens,
                    std::optional<int64_t> total_tokens,
                    int num_kv_heads,
                    int group_rows) {
    mla::Batch batch;
    batch.group_rows = group_rows;
    batch.seq_lens = to_integers("seq_lens", seq_lens);
    batch.num_heads = num_heads;
    batch.num_kv_heads = num_kv_heads;
    mla::NewTokens tokens = to_new_tokens(new_tokens);
    batch.new_tokens = std::move(tokens.each);
    if (tokens.uniform > 0) batch.new_tokens.assign(batch.seq_lens.size(), tokens.uniform);
    batch.total_tokens =
        total_tokens
            ? *total_tokens
            : std::accumulate(batch.new_tokens.begin(), batch.new_tokens.end(), int64_t{0});
    return batch;
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
              const py::object& new_tokens,
              int num_workers,
              const mla::CostModel& cost,
              const std::string& policy_name,
              int split_tiles,
              std::optional<int64_t> total_tokens,
              int num_kv_heads,
              const std::vector<std::pair<int, int>>& clusters,
              int group_rows) {
    const mla::Batch batch =
        to_batch(seq_lens, num_heads, new_tokens, total_tokens, num_kv_heads, group_rows);
    std::vector<mla::Clusters> limits;
    for (const auto& [ctas, count] : clusters) limits.push_back({ctas, count});
    const mla::Policy policy = mla::parse_policy(policy_name);
    mla::Plan result;
    {
        py::gil_scoped_release unlocked;
        result = mla::plan(batch, num_workers, cost, policy, split_tiles, limits);
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
              const py::object& new_tokens,
              int num_slots,
              std::optional<int64_t> capacity,
              std::optional<int64_t> total_tokens,
              int num_kv_heads,
              int group_rows) {
    const mla::Queue queue = to_queue(instructions);
    const mla::Batch batch =
        to_batch(seq_lens, num_heads, new_tokens, total_tokens, num_kv_heads, group_rows);
    mla::validate(queue, batch, num_slots, capacity.value_or(batch.num_sequences()));
}

py::tuple simulate(const WordArray& instructions,
                   int num_heads,
                   const py::object& new_tokens,
                   int num_workers,
                   const mla::CostModel& cost,
                   int group_rows) {
    const mla::Queue queue = to_queue(instructions);
    mla::check_cost_model(cost);
    mla::check_group_rows(group_rows);
    mla::check_range("num_heads", num_heads, 1, mla::kMaxHeads);
    mla::check_range("num_workers", num_workers, 1, mla::kMaxWorkers);
    const mla::TaskGraph graph = mla::parse_tasks(
        queue.words, queue.num_instructions, num_heads, to_new_tokens(new_tokens), group_rows);
    const mla::Timeline timeline = mla::simulate(graph, mla::queue_order(graph), num_workers, cost);
    std::vector<int32_t> worker;
    std::vector<double> start_us, end_us;
    for (size_t task = 0; task < graph.tasks.size(); ++task) {
        for (int mate = 0; mate < graph.tasks[task].num_mates; ++mate) {
            worker.push_back(timeline.worker[task] + mate);
            start_us.push_back(timeline.start_us[task]);
            end_us.push_back(timeline.end_us[task]);
        }
    }
    const auto count = static_cast<py::ssize_t>(worker.size());
    return py::make_tuple(to_array(std::move(worker), {count}),
                          to_float_array(start_us),
                          to_float_array(end_us),
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

py::tuple names(std::initializer_list<const char*> fields, int num_inputs = 0) {
    py::list all;
    for (const char* field : fields) all.append(field);
    for (int i = 0; i < num_inputs; ++i) all.append("input_" + std::to_string(i));
    return py::tuple(all);
}

py::dict word_names() {
    py::dict words;
    words["noop"] = names({"opcode"});
    words["end_of_queue"] = names({"opcode"});
    words["mla_partial"] = names({"opcode",
                                  "uid",
                                  "dst_batch",
                                  "dst_seq",
                                  "q_batch",
                                  "q_seq",
                                  "start",
                                  "end",
                                  "length",
                                  "row_begin",
                                  "num_rows",
                                  "num_mates",
                                  "mate",
                                  "adopted"});
    words["mla_reduction"] =
        names({"opcode", "uid", "shape", "dst_batch", "dst_seq"}, mla::kMaxReductionInputs);
    words["mla_reduction_run"] = names({"opcode",
                                        "uid",
                                        "shape",
                                        "dst_batch",
                                        "dst_seq",
                                        "first_input",
                                        "num_inputs",
                                        "input_step",
                                        "row_offset"});
    words["mla_fill"] = names({"opcode", "uid", "token_begin", "token_end"});
    return words;
}

void bind_constants(py::module_& m) {
    m.attr("INSTRUCTION_WORDS") = mla::kInstructionWords;
    m.attr("QUEUE_VERSION") = mla::kQueueVersion;
    m.attr("OPCODE_END_OF_QUEUE") = static_cast<int>(mla::Opcode::kEndOfQueue);
    m.attr("OPCODE_NOOP") = static_cast<int>(mla::Opcode::kNoop);
    m.attr("OPCODE_MLA_PARTIAL") = static_cast<int>(mla::Opcode::kMlaPartial);
    m.attr("OPCODE_MLA_REDUCTION") = static_cast<int>(mla::Opcode::kMlaReduction);
    m.attr("OPCODE_MLA_FILL") = static_cast<int>(mla::Opcode::kMlaFill);
    m.attr("LATENT_DIM") = mla::kLatentDim;
    m.attr("ROPE_DIM") = mla::kRopeDim;
    m.attr("KV_TILE") = mla::kKvTile;
    m.attr("MAX_ROWS") = mla::kMaxRows;
    m.attr("NARROW_ROWS") = mla::kNarrowRows;
    m.attr("NARROWEST_ROWS") = mla::kNarrowestRows;
    m.attr("MAX_REDUCTION_INPUTS") = mla::kMaxReductionInputs;
    m.attr("MAX_MATES") = mla::kMaxMates;
    m.attr("MAX_RUN_INPUTS") = mla::kMaxRunInputs;
    m.attr("COLUMN_CHUNK") = mla::kColumnChunk;
    m.attr("MAX_HEADS") = mla::kMaxHeads;
    m.attr("MAX_NEW_TOKENS") = mla::kMaxNewTokens;
    m.attr("MAX_WORKERS") = mla::kMaxWorkers;
    m.attr("WORDS") = word_names();

    py::dict rules;
    for (const mla::Rule& rule : mla::kRules) rules[rule.name] = rule.meaning;
    m.attr("RULES") = rules;
    py::list policies;
    for (const mla::PolicyName& policy : mla::kPolicyNames) policies.append(policy.name);
    m.attr("POLICIES") = py::tuple(policies);
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
          py::arg("split_tiles") = 0,
          py::arg("total_tokens") = py::none(),
          py::arg("num_kv_heads") = 1,
          py::arg("clusters") = std::vector<std::pair<int, int>>(),
          py::arg("group_rows") = mla::kMaxRows);
    m.def("validate",
          &validate,
          py::arg("instructions").noconvert(),
          py::arg("seq_lens"),
          py::arg("num_heads"),
          py::arg("new_tokens"),
          py::arg("num_slots"),
          py::arg("batch") = py::none(),
          py::arg("total_tokens") = py::none(),
          py::arg("num_kv_heads") = 1,
          py::arg("group_rows") = mla::kMaxRows);
    m.def("simulate",
          &simulate,
          py::arg("instructions").noconvert(),
          py::arg("num_heads"),
          py::arg("new_tokens"),
          py::arg("num_workers"),
          py::arg("cost"),
          py::arg("group_rows") = mla::kMaxRows);
    m.def("group_rows_of", &mla::group_rows_of, py::arg("slot_rows"));
    m.def("get_quality",
          &get_quality,
          py::arg("next_times"),
          py::arg("num_processors"),
          py::arg("num_tokens"),
          py::arg("seq_length"));
    bind_device_plan(m);
}
