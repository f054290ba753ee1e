#include "scheduler/simulate.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

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
          workers_(std::min<size_t>(num_workers, order.size())),
          waits_(graph.tasks.size()),
          first_streams_(workers_.size()),
          next_streams_(order.size() - workers_.size()),
          streaming_(workers_.size()),
          ending_(workers_.size()) {
        timeline_.worker.assign(graph.tasks.size(), kNone);
        timeline_.start_us.assign(graph.tasks.size(), 0.0);
        timeline_.end_us.assign(graph.tasks.size(), kNotEnded);
    }

    Timeline run() {
        now_ = cost_.launch_us;
        for (size_t worker = 0; worker < workers_.size(); ++worker) {
            take_ticket(static_cast<int32_t>(worker));
        }
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
    };

    // A reduction sleeps on one unfinished input at a time; sleepers on the same input
    // form a list.
    struct Wait {
        int32_t first_sleeper = kNone;  // on this task
        int32_t next_sleeper = kNone;   // on the same input as this task
        int32_t num_seen = 0;           // inputs that have ended
        double ready_us = 0.0;          // when all of those are visible
    };

    // Handles the next event; false when there is none. Progress is counted in tiles that
    // every streaming partial has advanced, so that a change of rate moves no event.
    bool advance() {
        const double tile_us = cost_.tile_us(num_streams_, graph_.kv_sharing);
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
            --num_streams_;
            ending_.push({now_ + partial_store_us(task_of(worker), cost_), worker});
        } else if (at_us == begin_us) {
            const int32_t worker = begins.pop().worker;
            ++num_streams_;
            streaming_.push({tiles_done_ + num_kv_tiles(task_of(worker)), worker});
        } else {
            finish(ending_.pop().worker);
        }
        return true;
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
                begin_or_sleep(worker.task);
                break;
            default:
                ending_.push({now_ + cost_.instruction_us, index});
        }
    }

    void begin_or_sleep(int32_t reduction) {
        const Task& task = graph_.tasks[reduction];
        Wait& wait = waits_[reduction];
        for (; wait.num_seen < task.num_inputs; ++wait.num_seen) {
            const int32_t input = graph_.inputs[task.input_begin + wait.num_seen];
            if (timeline_.end_us[input] == kNotEnded) {
                wait.next_sleeper = waits_[input].first_sleeper;
                waits_[input].first_sleeper = reduction;
                return;
            }
            wait.ready_us = std::max(wait.ready_us, timeline_.end_us[input] + cost_.dependency_us);
        }
        const int32_t index = timeline_.worker[reduction];
        const double start_us = timeline_.start_us[reduction];
        const bool follows = workers_[index].follows && wait.ready_us <= start_us;
        // Decoding is hidden by the wait, if there is one.
        const double decoded_us = start_us + (follows ? 0.0 : cost_.instruction_us);
        ending_.push(
            {std::max(decoded_us, wait.ready_us) + reduction_us(task, follows, cost_), index});
    }

    void finish(int32_t index) {
        const int32_t task = workers_[index].task;
        timeline_.end_us[task] = now_;
        int32_t sleeper = waits_[task].first_sleeper;
        while (sleeper != kNone) {
            const int32_t next = waits_[sleeper].next_sleeper;
            begin_or_sleep(sleeper);
            sleeper = next;
        }
        take_ticket(index);
    }

    const TaskGraph& graph_;
    const std::vector<int32_t>& order_;
    const CostModel& cost_;
    const Timeline* partials_;  // if their times are known
    std::vector<Worker> workers_;
    std::vector<Wait> waits_;
    EventFifo first_streams_;  // begins of a worker's first partial, and of later ones:
    EventFifo next_streams_;   // each after a constant time, so in order
    EventHeap streaming_;      // ends of streams, in tiles on the scale of tiles_done_
    EventHeap ending_;         // ends of instructions
    Timeline timeline_;
    double now_ = 0.0;
    double tiles_done_ = 0.0;
    int num_streams_ = 0;
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
