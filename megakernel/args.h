// What the host hands to every megakernel, whatever its opcodes: the queue, its
// state, and where errors and timings go. Plain C++, shared with the host.
#pragma once

#include <cstdint>

namespace mk {

// Device memory that a workspace owns; zeroed once, then kept by the kernel alone. One launch
// at a time may use it: two streams, two queue states.
struct QueueState {
    int32_t next_ticket;   // 0 between launches
    int32_t epoch;         // of the last launch; what the next one counts up from
    int32_t ctas_left;     // CTAs that drew their last ticket; 0 between launches
    int32_t failed_epoch;  // epoch of the newest launch that a watchdog ended
};
inline constexpr int kQueueStateWords = 32;
static_assert(sizeof(QueueState) <= kQueueStateWords * sizeof(int32_t), "queue state fits");

// What a spin wait was for. `index` in the failure says which.
enum class WaitKind : int32_t {
    kInstruction = 1,   // ring slot to hold a decoded instruction
    kRetired = 2,       // ring slot to be free again
    kPrefetchGate = 3,  // loads of the previous instruction to be issued
    kPage = 4,          // logical shared-memory page
    kSemaphore = 5,     // semaphore of the instruction
    kDoneFlag = 6,      // completion flag in global memory
    kBadOpcode = 7,     // not a wait: the queue held an opcode that this kernel lacks
    kBadLength = 8,     // not a wait: a request's length was out of range
    kCluster = 9,       // other CTAs of the cluster
};

// In pinned host memory, mapped into the device. Written by the first CTA that gives up.
struct FailureRecord {
    int32_t valid;
    int32_t sm;
    int32_t role;         // mk::Role
    int32_t instruction;  // ticket
    int32_t uid;
    int32_t opcode;
    int32_t wait_kind;
    int32_t index;
    int32_t expected;
    int32_t seen;
};

// Words of one timing record, 32 low bits of %globaltimer (ns) but for the first.
enum class TimingWord : int {
    kSm = 0,  // SM + 1; 0: the instruction did not run
    kFetched,
    kLoadBegin,
    kLoadEnd,
    kComputeBegin,
    kComputeEnd,
    kStoreBegin,
    kStoreEnd,
};
inline constexpr int kTimingWords = 8;

struct MegakernelArgs {
    const int32_t* instructions;  // [num_instructions, 32]
    int32_t num_instructions;
    // No kernel before this one in the stream writes the instructions: they may be read while such
    // kernels still run.
    bool instructions_are_constant;
    int32_t tic;  // >= 0, added to the epoch
    QueueState* queue;
    FailureRecord* failure;  // device address of the pinned record
    int32_t* timings;        // [num_instructions, kTimingWords], timed kernels only
    uint32_t timeout_us;     // of a wait on another CTA; local waits are given twice that
};

}  // namespace mk
