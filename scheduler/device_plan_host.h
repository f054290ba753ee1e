// The device planner's team on the host: one thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "scheduler/device_plan.h"

namespace mla {

class TeamOfOne {
  public:
    int rank() const { return 0; }
    int size() const { return 1; }
    int lane() const { return 0; }
    int lanes() const { return 1; }
    int group() const { return 0; }
    int num_groups() const { return 1; }
    void sync() const {}

    template <class Totals>
    Totals sum(const Totals& own) const {
        return own;
    }
    template <class Totals>
    Totals total(const Totals& own) const {
        return own;
    }

    int least(const uint32_t* values, int n) const {
        int best = 0;
        for (int i = 1; i < n; ++i) {
            if (values[i] <= values[best]) best = i;
        }
        return best;
    }

    void prefix_sums(uint32_t* values, int n) const {
        uint32_t before = 0;
        for (int i = 0; i < n; ++i) {
            const uint32_t value = values[i];
            values[i] = before;
            before += value;
        }
        values[n] = before;
    }

    void sort(const DevicePlanState& s, int n) const {
        uint32_t* next = s.sort_table;  // place of each key
        std::fill_n(next, device_plan::kKeys, 0);
        for (int i = 0; i < n; ++i) ++next[s.keys[i] % device_plan::kKeys];
        prefix_sums(next, device_plan::kKeys - 1);
        for (int i = 0; i < n; ++i) s.places[i] = next[s.keys[i] % device_plan::kKeys]++;
    }

    void write(int32_t* words, int place, const InstructionHead& head) const {
        int32_t* to = words + int64_t{place} * kInstructionWords;
        std::memcpy(to, head.words, sizeof(head.words));
        std::fill(to + InstructionHead::kWords, to + kInstructionWords, 0);
    }
};

}  // namespace mla
