#include "scheduler/simulate.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

#include "scheduler/task_cost.h"

namespace mla {

namespace {

constexpr int32_t kNone = -1;

// Worker order breaks ties, so that a simulation is reproducible.
struct Event {
    double at;
    int32_t worker;
    bool operator>(const Event& other) const {
        return at != other.at ? at > other.at : worker > other.worker;
    }
};

// Of no event.
constexpr double kNever = std::numeric_limits<double>::infinity();

// The earliest event first. A binary heap; std::priority_queue cannot reserve.
class EventHeap {
  public:
    explicit EventHeap(size_t capacity) { events_.reserve(capacity); }
    bool empty() const { return events_.empty(); }
    double next_at() const { return empty() ? kNever : events_.front().at; }
    void push(Event event) {
        events_.push_back(event);
        std::push_heap(events_.begin(), events_.end(), std::greater<>());
    }
    Event pop() {
        std::pop_heap(events_.begin(), events_.end(), std::greater<>());
        const Event event = events_.back();
        events_.pop_back();
        return event;
    }

  private:
    std::vector<Event> events_;
};

// Events that come in the order of their times anyway.
class EventFifo {
  public:
    explicit EventFifo(size_t capacity) { events_.reserve(capacity); }
    double next_at() const { return head_ == events_.size() ? kNever : events_[head_].at; }
    void push(Event event) { events_.push_back(event); }
    Event pop() { return events_[head_++]; }

  private:
    std::vector<Event> events_;
    size_t head_ = 0;
};

// Tiles that take no longer than one.
double tiles_at_once(const TaskGraph& graph) {
    const bool is_wide = std::any_of(graph.tasks.begin(), graph.tasks.end(), [](const Task& task) {
        return task.opcode == Opcode::kMlaPartial && task.num_rows > kNarrowRows;
    });
    return is_wide ? 1 : kNarrowTilesAtOnce;
}

class Simulation {
  public:
    Simulation(const TaskGraph& graph,
               const std::vector<int32_t>& order,
               int num_workers,
               const CostModel& cost,
               const Timeline* partials)
        : graph_(graph),
          order_(order),
          cost_(cost),
          partials_(partials),
          least_tiles_(tiles_at_once(graph)),
          workers_(std::min<size_t>(num_workers, num_instructions(graph))),
          sleepers_(graph.tasks.size()),
          waits_(graph.merges.size()),
          first_streams_(workers_.size()),
          next_streams_(order.size()),
          streaming_(workers_.size()),
          ending_(workers_.size()) {
        timeline_.worker.assign(graph.tasks.size(), kNone);
        timeline_.start_us.assign(graph.tasks.size(), 0.0);
        timeline_.end_us.assign(graph.tasks.size(), kNotEnded);
    }

    Timeline run() {
        now_ = cost_.launch_us;
        for (size_t first = 0; first < workers_.size();) first += begin_side_by_side(first);
        while (advance()) {
        }
        timeline_.makespan_us = order_.empty() ? 0.0 : now_;
        return std::move(timeline_);
    }

  private:
    static constexpr double kNotEnded = -1.0;

    struct Worker {
        int32_t task = kNone;
        bool follows = false;  // has run an instruction before this one
        int num_mates = 1;     // workers side by side that share the task, this one first
    };

    // The reductions of a merge that have a worker wait together; the merge sleeps on one
    // unfinished input at a time.
    struct Wait {
        int32_t first_reduction = kNone;  // that waits
        int32_t next_sleeper = kNone;     // on the same input as this merge
        int32_t num_seen = 0;             // inputs that have ended
        bool asleep = false;
        double ready_us = 0.0;  // when all of those are visible
    };

    // Heads and links of lists through the tasks.
    struct Sleepers {
        int32_t first_merge = kNone;     // that sleeps on this task
        int32_t next_reduction = kNone;  // that waits for the same merge as this task
    };

    // Handles the next event; false when there is none. Progress is counted in tiles that
    // every streaming partial has advanced, so that a change of rate moves no event.
    bool advance() {
        const double tile_us = cost_.stream_tile_us(num_different_streams_);
        const double stream_end_us =
            streaming_.empty() ? kNever
                               : now_ + std::max(0.0, streaming_.next_at() - tiles_done_) * tile_us;
        EventFifo& begins =
            first_streams_.next_at() <= next_streams_.next_at() ? first_streams_ : next_streams_;
        const double begin_us = begins.next_at();
        const double end_us = ending_.next_at();

        const double at_us = std::min({stream_end_us, begin_us, end_us});
        if (at_us == kNever) return false;
        if (num_streams_ > 0) tiles_done_ += (at_us - now_) / tile_us;
        now_ = at_us;
        if (at_us == stream_end_us) {
            const int32_t worker = streaming_.pop().worker;
            count_streams(task_of(worker), -1);
            ending_.push({now_ + partial_store_us(task_of(worker), cost_), worker});
        } else if (at_us == begin_us) {
            const int32_t worker = begins.pop().worker;
            count_streams(task_of(worker), 1);
            const double tiles = std::max(num_tiles_of_mate(task_of(worker)), least_tiles_);
            streaming_.push({tiles_done_ + tiles, worker});
        } else {
            finish(ending_.pop().worker);
        }
        return true;
    }

    void count_streams(const Task& partial, int sign) {
        num_streams_ += sign * partial.num_mates;
        num_different_streams_ +=
            static_cast<double>(sign * partial.num_mates) / partial.kv_sharing;
        if (num_streams_ == 0) num_different_streams_ = 0.0;  // rid of rounding errors
    }

    // The first instructions: mates have workers side by side. Returns how many.
    int begin_side_by_side(size_t first) {
        take_ticket(static_cast<int32_t>(first));
        Worker& worker = workers_[first];
        if (worker.task == kNone) return 1;
        worker.num_mates = static_cast<int>(
            std::min<size_t>(graph_.tasks[worker.task].num_mates, workers_.size() - first));
        for (int mate = 1; mate < worker.num_mates; ++mate) {
            workers_[first + mate].task = worker.task;
        }
        return worker.num_mates;
    }

    const Task& task_of(int32_t worker) const { return graph_.tasks[workers_[worker].task]; }

    void take_ticket(int32_t index) {
        if (next_ticket_ == order_.size()) return;
        Worker& worker = workers_[index];
        worker.follows = worker.task != kNone;
        worker.task = order_[next_ticket_++];
        timeline_.worker[worker.task] = index;
        timeline_.start_us[worker.task] = now_;

        switch (graph_.tasks[worker.task].opcode) {
            case Opcode::kMlaPartial:
                if (partials_ != nullptr) {
                    ending_.push({partials_->end_us[worker.task], index});
                } else {
                    EventFifo& begins = worker.follows ? next_streams_ : first_streams_;
                    begins.push({now_ + partial_lead_us(worker.follows, cost_), index});
                }
                break;
            case Opcode::kMlaReduction:
                begin_or_wait(worker.task);
                break;
            case Opcode::kMlaFill:
                ending_.push({now_ + fill_us(task_of(index), cost_), index});
                break;
            default:
                ending_.push({now_ + cost_.instruction_us, index});
        }
    }

    void begin_or_wait(int32_t reduction) {
        const int32_t merge = graph_.tasks[reduction].merge;
        if (inputs_ended(merge)) {
            begin(reduction);
            return;
        }
        sleepers_[reduction].next_reduction = waits_[merge].first_reduction;
        waits_[merge].first_reduction = reduction;
    }

    // Otherwise the merge sleeps on an input that has not.
    bool inputs_ended(int32_t index) {
        const Merge& merge = graph_.merges[index];
        Wait& wait = waits_[index];
        if (wait.asleep) return false;
        for (; wait.num_seen < merge.num_inputs; ++wait.num_seen) {
            const int32_t input = graph_.input(merge, wait.num_seen);
            if (timeline_.end_us[input] == kNotEnded) {
                wait.next_sleeper = sleepers_[input].first_merge;
                sleepers_[input].first_merge = index;
                wait.asleep = true;
                return false;
            }
            wait.ready_us = std::max(wait.ready_us, timeline_.end_us[input] + cost_.dependency_us);
        }
        return true;
    }

    void begin(int32_t reduction) {
        const Task& task = graph_.tasks[reduction];
        const double ready_us = waits_[task.merge].ready_us;
        const int32_t index = timeline_.worker[reduction];
        const double start_us = timeline_.start_us[reduction];
        const bool follows = workers_[index].follows && ready_us <= start_us;
        // Decoding is hidden by the wait, if there is one.
        const double decoded_us = start_us + (follows ? 0.0 : cost_.instruction_us);
        const double busy_us =
            reduction_us(graph_.num_inputs(task), task.num_rows, task.num_cols, follows, cost_);
        ending_.push({std::max(decoded_us, ready_us) + busy_us, index});
    }

    void finish(int32_t index) {
        const int32_t task = workers_[index].task;
        timeline_.end_us[task] = now_;
        for (int32_t merge = sleepers_[task].first_merge; merge != kNone;) {
            const int32_t next = waits_[merge].next_sleeper;
            wake(merge);
            merge = next;
        }
        const int num_mates = std::exchange(workers_[index].num_mates, 1);
        for (int mate = 0; mate < num_mates; ++mate) take_ticket(index + mate);
    }

    void wake(int32_t merge) {
        waits_[merge].asleep = false;
        if (!inputs_ended(merge)) return;
        int32_t reduction = waits_[merge].first_reduction;
        for (; reduction != kNone; reduction = sleepers_[reduction].next_reduction) {
            begin(reduction);
        }
    }

    const TaskGraph& graph_;
    const std::vector<int32_t>& order_;
    const CostModel& cost_;
    const Timeline* partials_;  // if their times are known
    const double least_tiles_;  // that a partial takes the time of
    std::vector<Worker> workers_;
    std::vector<Sleepers> sleepers_;  // of each task
    std::vector<Wait> waits_;         // of each merge
    EventFifo first_streams_;         // begins of a worker's first partial, and of later ones:
    EventFifo next_streams_;          // each after a constant time, so in order
    EventHeap streaming_;             // ends of streams, in tiles on the scale of tiles_done_
    EventHeap ending_;                // ends of instructions
    Timeline timeline_;
    double now_ = 0.0;
    double tiles_done_ = 0.0;
    int num_streams_ = 0;
    double num_different_streams_ = 0.0;  // streams that read the same KV count as one
    size_t next_ticket_ = 0;
};

}  // namespace

Timeline simulate(const TaskGraph& graph,
                  const std::vector<int32_t>& order,
                  int num_workers,
                  const CostModel& cost) {
    return Simulation(graph, order, num_workers, cost, nullptr).run();
}

Timeline simulate_reductions(const TaskGraph& graph,
                             const std::vector<int32_t>& order,
                             int num_workers,
                             const CostModel& cost,
                             const Timeline& partials) {
    return Simulation(graph, order, num_workers, cost, &partials).run();
}

std::vector<int32_t> queue_order(const TaskGraph& graph) {
    std::vector<int32_t> order(graph.tasks.size());
    std::iota(order.begin(), order.end(), 0);
    return order;
}

}  // namespace mla
