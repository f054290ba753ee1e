// Proves that a queue computes the attention of a batch and cannot deadlock.
#pragma once

#include <cstdint>

#include "scheduler/batch.h"

namespace mla {

// Rule names are stable: messages end in "(rule: <name>)".
struct Rule {
    const char* name;
    const char* meaning;
};

namespace rules {

inline constexpr Rule kBatch{"batch", "the tensors hold every sequence"};
inline constexpr Rule kOpcode{"opcode", "the opcode is known"};
inline constexpr Rule kEndOfQueue{"end-of-queue", "nothing runs behind the end of the queue"};
inline constexpr Rule kReserved{"reserved", "words and bits without a meaning are 0"};
inline constexpr Rule kUid{"uid", "uids are >= 0 and unique"};
inline constexpr Rule kSlot{"slot", "a scratch slot exists and is its writer's uid"};
inline constexpr Rule kRequest{"request", "the sequence exists"};
inline constexpr Rule kToken{"token", "the sequence has the token, the same at both ends"};
inline constexpr Rule kRows{"rows", "a partial has all rows of its row group"};
inline constexpr Rule kRowGroup{"row-group", "rows begin at a row group, or lie in one"};
inline constexpr Rule kLength{"length", "the length is the sequence's"};
inline constexpr Rule kKvRange{"kv-range", "0 <= start < end <= length"};
inline constexpr Rule kKvAlignment{"kv-alignment", "pieces are cut at whole tiles"};
inline constexpr Rule kMates{"mates", "mates are complete, in order, and share all but the keys"};
inline constexpr Rule kMatesFirst{
    "mates-first",
    "mates come before all but no-ops, larger groups first, at multiples of their number"};
inline constexpr Rule kDestination{"destination", "the output is that of the inputs' sequence"};
inline constexpr Rule kInputCount{"input-count", "a list has 1 to 27 inputs, a run 1 to 65536"};
inline constexpr Rule kRun{"run", "a run steps up, and counts its rows up from the first"};
inline constexpr Rule kSlice{"slice", "rows and columns of a slice exist"};
inline constexpr Rule kInput{"input", "an input is a scratch slot"};
inline constexpr Rule kOrder{"order", "an input is written earlier in the queue"};
inline constexpr Rule kInputRequest{"input-request", "what is merged belongs to one sequence"};
inline constexpr Rule kInputRows{"input-rows", "an input holds the rows and columns read"};
inline constexpr Rule kFill{"fill", "a fill covers tokens without keys, and no others"};
inline constexpr Rule kReadOnce{"read-once", "nothing in scratch is read twice"};
inline constexpr Rule kOutputOnce{"output-once", "no output is written twice"};
inline constexpr Rule kUnread{"unread", "everything in scratch is read"};
inline constexpr Rule kUnfilled{"unfilled", "every token without keys is filled"};
inline constexpr Rule kCoveredTwice{"covered-twice", "no (row, position) is attended to twice"};
inline constexpr Rule kUncovered{"uncovered", "every (row, position) is attended to"};

}  // namespace rules

inline constexpr Rule kRules[] = {
    rules::kBatch,        rules::kOpcode,       rules::kEndOfQueue, rules::kReserved,
    rules::kUid,          rules::kSlot,         rules::kRequest,    rules::kToken,
    rules::kRows,         rules::kRowGroup,     rules::kLength,     rules::kKvRange,
    rules::kKvAlignment,  rules::kMates,        rules::kMatesFirst, rules::kDestination,
    rules::kInputCount,   rules::kRun,          rules::kSlice,      rules::kInput,
    rules::kOrder,        rules::kInputRequest, rules::kInputRows,  rules::kFill,
    rules::kReadOnce,     rules::kOutputOnce,   rules::kUnread,     rules::kUnfilled,
    rules::kCoveredTwice, rules::kUncovered,
};

struct Queue {
    const int32_t* words;  // kInstructionWords per instruction; not trusted
    int64_t num_instructions;
};

// Throws ScheduleError for the first violation: rules of single instructions in queue
// order, then those of the whole. Sequences without tokens need no instruction; those of
// length 0, and padding, need fills.
//
// Why this suffices: a reduction writes the sequence, rows and columns that it reads, as does a
// partial that adopts a slot, and both read only what was written before. If nothing in scratch
// is read twice or left unread and no output is written twice, then whatever a partial computes
// reaches exactly one output, its own. So the output is right if and only if the partials cover
// every (row, position) once, and the fills every token without keys. Time and memory grow with
// the number of instructions and of the inputs that they read (times log), whatever their words
// say.
//
// Mates write once, what all of them compute: only mate 0 counts as a writer. They wait for each
// other, and adopt nothing, so each must be the first instruction of a CTA, and all of them in one
// cluster. As larger groups come first, a group of k begins at a multiple of k. That the launch has
// as many CTAs as the queue has mates is for the launch to check.
//
// `capacity`: sequences that the tensors hold, at least batch.num_sequences(). The batch is
// checked by check_batch().
void validate(const Queue& queue, const Batch& batch, int num_slots, int64_t capacity);

}  // namespace mla
