// Python module tests._hanging: a megakernel whose instructions hang where their words say, to see
// what the watchdog writes down.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "megakernel/launch.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

using Config = mk::DefaultConfig;
using State = mk::State<Config>;

struct HangGlobals {
    mk::MegakernelArgs megakernel;
    int32_t* finished;  // [uid]: warps that came to the end and waited for nothing in vain
    __device__ void prefetch() const {}
};

enum HangWord {        // after the opcode and the uid
    kWaiter = 2,       // the role that waits for ever; -1: none
    kNumWaitingWarps,  // so many of its warps, the first ones
    kSemaphore,        // what they wait for: nobody raises it
    kKeptPage,         // page that is never released; -1: none
};

struct Hang {
    static constexpr int kOpcode = 1;
    static constexpr int kNumSemaphores = Config::kSemaphoresPerInstruction;
    static constexpr mk::Role kPrefetchGate = mk::Role::kLoader;

    struct Controller {
        __device__ static int arrival_count(const HangGlobals&, int) { return 1; }
        __device__ static int released_page(const HangGlobals&, const int32_t*, int k) { return k; }
    };

    template <mk::Role kRole>
    struct Part {
        __device__ static void run(const HangGlobals& g, State& state) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            const int warp = kRole == mk::Role::kConsumer ? threadIdx.x / mk::kWarpThreads : 0;
            const bool waits = state.word(kWaiter) == static_cast<int>(kRole) &&
                               warp < state.word(kNumWaitingWarps);
            if (waits && !state.wait(state.word(kSemaphore), 0)) return;
            if (lane == 0) atomicAdd(&g.finished[state.uid()], 1);
        }
    };
    struct Loader {
        __device__ static void run(const HangGlobals& g, State& state) {
            const int page = threadIdx.x % mk::kWarpThreads;
            bool ok = true;
            if (page < Config::kNumSmemPages) {
                ok = state.wait_page(page);
                if (page != state.word(kKeptPage)) {
                    state.release_page(page, Config::kPageReleaseArrivals);
                }
            }
            if (!__all_sync(~0u, ok)) return;
            Part<mk::Role::kLoader>::run(g, state);
        }
    };
    using Launcher = Part<mk::Role::kLauncher>;
    using Consumer = Part<mk::Role::kConsumer>;
    using Storer = Part<mk::Role::kStorer>;
};

std::array<int32_t, mk::kInstructionWords> instruction(
    int uid, int waiter, int num_waiting_warps, int semaphore, int kept_page) {
    std::array<int32_t, mk::kInstructionWords> words{};
    words[mk::kWordOpcode] = Hang::kOpcode;
    words[mk::kWordUid] = uid;
    words[kWaiter] = waiter;
    words[kNumWaitingWarps] = num_waiting_warps;
    words[kSemaphore] = semaphore;
    words[kKeptPage] = kept_page;
    return words;
}

// Addresses are those of device tensors: instructions int32 [num_instructions, 32], queue_state
// int32 [32], zeroed once and then left alone, finished as in HangGlobals.
void run(uintptr_t instructions,
         int num_instructions,
         uintptr_t queue_state,
         uintptr_t finished,
         uint32_t timeout_us,
         int num_ctas,
         uintptr_t stream,
         int device) {
    const mk::DeviceGuard guard(device);
    HangGlobals g{};
    g.megakernel.instructions = reinterpret_cast<const int32_t*>(instructions);
    g.megakernel.num_instructions = num_instructions;
    g.megakernel.queue = reinterpret_cast<mk::QueueState*>(queue_state);
    g.megakernel.failure = mk::FailureRecords::device(device);
    g.megakernel.timeout_us = timeout_us;
    g.finished = reinterpret_cast<int32_t*>(finished);
    mk::launch<Config, mk::OpcodeList<Hang>>(
        g, mk::Grid{num_ctas}, device, reinterpret_cast<cudaStream_t>(stream));
}

// None, or what a launch on this device reported since the last call.
py::object take_failure(int device) {
    const auto record = mk::FailureRecords::take(device);
    if (!record) return py::none();
    return py::dict("sm"_a = record->sm,
                    "role"_a = record->role,
                    "instruction"_a = record->instruction,
                    "uid"_a = record->uid,
                    "opcode"_a = record->opcode,
                    "wait"_a = record->wait_kind,
                    "index"_a = record->index,
                    "expected"_a = record->expected,
                    "seen"_a = record->seen);
}

}  // namespace

PYBIND11_MODULE(_hanging, m) {
    m.doc() = "A megakernel that hangs where it is told to (sm_90a).";
    m.attr("QUEUE_STATE_WORDS") = mk::kQueueStateWords;
    m.attr("OPCODE") = Hang::kOpcode;
    m.attr("NUM_SEMAPHORES") = Hang::kNumSemaphores;
    m.attr("CONSUMER_WARPS") = Config::kNumConsumerWarps;
    m.attr("WARPS") = mk::retire_arrivals<Config>();
    m.attr("ROLES") = py::dict("loader"_a = static_cast<int>(mk::Role::kLoader),
                               "launcher"_a = static_cast<int>(mk::Role::kLauncher),
                               "consumer"_a = static_cast<int>(mk::Role::kConsumer),
                               "storer"_a = static_cast<int>(mk::Role::kStorer));
    m.attr("WAIT_PAGE") = static_cast<int>(mk::WaitKind::kPage);
    m.attr("WAIT_SEMAPHORE") = static_cast<int>(mk::WaitKind::kSemaphore);
    m.def("num_sms", &mk::num_sms);
    m.def("take_failure", &take_failure);
    m.def("instruction",
          &instruction,
          py::arg("uid"),
          py::kw_only(),
          py::arg("waiter") = -1,
          py::arg("num_waiting_warps") = int{Config::kNumConsumerWarps},
          py::arg("semaphore") = 0,
          py::arg("kept_page") = -1);
    m.def("run",
          &run,
          py::arg("instructions"),
          py::arg("num_instructions"),
          py::arg("queue_state"),
          py::arg("finished"),
          py::arg("timeout_us"),
          py::arg("num_ctas"),
          py::arg("stream"),
          py::arg("device"));
}
