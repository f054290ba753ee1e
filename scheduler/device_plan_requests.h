// Requests as the device planner reads them: tokens, flat tokens, and which of those are filled.
#pragma once

#include <cstdint>

#include "scheduler/device_plan_problem.h"
#include "scheduler/device_plan_state.h"

namespace mla {

class DevicePlanRequests {
  public:
    MLA_HOST_DEVICE DevicePlanRequests(const DevicePlanProblem& p, const DevicePlanState& s)
        : p_(p), s_(s) {}

    // Sequences are KV-head-major. Nearly always there is one KV head.
    MLA_HOST_DEVICE int kv_head_of(int sequence) const {
        int head = 0;
        MLA_SHORT_LOOP
        for (int end = p_.num_requests; end <= sequence; end += p_.num_requests) ++head;
        return head;
    }
    MLA_HOST_DEVICE int request_of(int sequence) const {
        return sequence - kv_head_of(sequence) * p_.num_requests;
    }
    MLA_HOST_DEVICE int tokens_of(int request) const {
        if (p_.cu_seqlens_q == nullptr) return p_.s_q;
        const int tokens = p_.cu_seqlens_q[request + 1] - p_.cu_seqlens_q[request];
        return device_plan::clamp(tokens, 0, p_.s_q);
    }

    // Empty sequences are filled several at a time; the first of them says for how many.
    MLA_HOST_DEVICE bool begins_fill(int sequence) const {
        return needs_fill(sequence) && (request_of(sequence) % device_plan::kFillSequences == 0 ||
                                        !needs_fill(sequence - 1));
    }
    MLA_HOST_DEVICE int first_token(int sequence) const {
        const int head = kv_head_of(sequence);
        const int request = sequence - head * p_.num_requests;
        return head * p_.total_tokens +
               (p_.cu_seqlens_q == nullptr ? request * p_.s_q : p_.cu_seqlens_q[request]);
    }
    MLA_HOST_DEVICE int end_token(int first_sequence) const {
        const int first = request_of(first_sequence);
        int last = first_sequence;
        MLA_SHORT_LOOP
        for (int request = first + 1;
             request < p_.num_requests && request % device_plan::kFillSequences != 0 &&
             needs_fill(last + 1);
             ++request) {
            ++last;
        }
        return first_token(last) + tokens_of(first + last - first_sequence);
    }

    // Tokens behind the last request's.
    MLA_HOST_DEVICE int padding_begin() const {
        return p_.cu_seqlens_q == nullptr
                   ? p_.total_tokens
                   : device_plan::clamp(p_.cu_seqlens_q[p_.num_requests], 0, p_.total_tokens);
    }
    MLA_HOST_DEVICE int padding_fills() const {  // of one KV head
        return device_plan::ceil_div(p_.total_tokens - padding_begin(), device_plan::kFillTokens);
    }

  private:
    MLA_HOST_DEVICE bool needs_fill(int sequence) const {
        return s_.rows[sequence] > 0 && s_.length[sequence] == 0;
    }

    const DevicePlanProblem& p_;
    const DevicePlanState& s_;
};

}  // namespace mla
