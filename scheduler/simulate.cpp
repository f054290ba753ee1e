#include "scheduler/simulate.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>

#include "scheduler/task_cost.h"

namespace mla {

namespace {

constexpr int32_t kNone = -1;

// Worker order breaks ties, so that a simulation is reproducible. Events are compared as integers,
// which the bits of times, being no less than 0, allow: that takes no branch, which no processor
// could predict.
struct Event {
    double at;
    int32_t worker;
    bool operator<(const Event& other) const { return key() < other.key(); }

  private:
    __int128 key() const {
        int64_t bits;
        std::memcpy(&bits, &at, sizeof(bits));
        const auto high = static_cast<unsigned __int128>(bits) << 64;
        return static_cast<__int128>(high | static_cast<uint32_t>(worker));
    }
};

// Behind all others.
constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr Event kNoEvent{kNever, 0};

// The earliest event first. A binary heap; with std::push_heap and std::pop_heap, which branch on
// every comparison, planning takes 8% longer.
class EventHeap {
  public:
    void reserve(size_t capacity) { events_.reserve(capacity); }
    const Event& next() const { return events_.empty() ? kNoEvent : events_.front(); }
    void push(Event event) {
        size_t hole = events_.size();
        events_.push_back(event);
        for (; hole > 0; hole = (hole - 1) / 2) {
            const Event& parent = events_[(hole - 1) / 2];
            if (!(event < parent)) break;
            events_[hole] = parent;
        }
        events_[hole] = event;
    }
    Event pop() {
        const Event first = events_.front();
        const Event last = events_.back();
        events_.pop_back();
        const size_t size = events_.size();
        if (size == 0) return first;
        size_t hole = 0;
        for (size_t child = 1; child < size; child = 2 * hole + 1) {
            child += (child + 1 < size) && (events_[child + 1] < events_[child]);
            if (!(events_[child] < last)) break;
            events_[hole] = events_[child];
            hole = child;
        }
        events_[hole] = last;
        return first;
    }

  private:
    std::vector<Event> events_;
};

// Events that come in the order of their times anyway.
class EventFifo {
  public:
    void reserve(size_t capacity) { events_.reserve(capacity + 1); }
    const Event& next() const { return events_[head_]; }
    void push(Event event) {
        events_.back() = event;
        events_.push_back(kNoEvent);
    }
    Event pop() { return events_[head_++]; }

  private:
    std::vector<Event> events_{kNoEvent};  // which is always the last
    size_t head_ = 0;
};

// The earliest event first. Those that come in the order of their times, as most do, wait in line.
class EventQueue {
  public:
    void reserve(size_t capacity) { line_.reserve(capacity); }
    const Event& next() const { return std::min(line_.next(), others_.next()); }
    void push(Event event) {
        if (last_in_line_ < event) {
            last_in_line_ = event;
            line_.push(event);
        } else {
            others_.push(event);
        }
    }
    Event pop() { return others_.next() < line_.next() ? others_.pop() : line_.pop(); }

  private:
    EventFifo line_;
    Event last_in_line_{0.0, 0};  // or gone from there
    EventHeap others_;
};

// Tiles that take no longer than one.
double tiles_at_once(const TaskGraph& graph) {
    const bool is_wide = std::any_of(graph.tasks.begin(), graph.tasks.end(), [](const Task& task) {
        return task.opcode == Opcode::kMlaPartial && task.num_rows > kNarrowRows;
    });
    return is_wide ? 1 : kNarrowTilesAtOnce;
}

}  // namespace

class Simulation {
  public:
    Simulation(const TaskGraph& graph,
               const std::vector<int32_t>& order,
               int num_workers,
               const CostModel& cost)
        : cost_(cost),
          least_tiles_(tiles_at_once(graph)),
          spread_(!order.empty() && graph.tasks[order[0]].opcode == Opcode::kNoop),
          now_(cost.launch_us) {
        set_queue(graph, order, num_workers);
        first_streams_.reserve(workers_.size());
        next_streams_.reserve(order.size());
        streaming_.reserve(workers_.size());
        for (size_t first = 0; first < workers_.size();) first += begin_side_by_side(first);
    }

    // Until every task of the queue has a worker.
    void hand_out() {
        while (!queue_is_empty() && advance()) {
        }
    }

    // Puts more behind the same queue, for the workers that found it empty and those that are new.
    void extend(const TaskGraph& graph, const std::vector<int32_t>& order, int num_workers) {
        set_queue(graph, order, num_workers);
        for (size_t i = 0; i < workers_.size(); ++i) {
            if (workers_[i].idle) take_ticket(static_cast<int32_t>(i));
        }
    }

    // Where every task of the queue is some worker's first one: when each ends.
    void set_ends(const std::vector<double>& end_us) {
        first_streams_ = {};
        ending_ = {};
        for (size_t i = 0; i < workers_.size(); i += workers_[i].num_mates) {
            ending_.push({end_us[workers_[i].task], static_cast<int32_t>(i)});
        }
    }

    Timeline run() {
        while (advance()) {
        }
        timeline_.makespan_us = order_->empty() ? 0.0 : now_;
        return std::move(timeline_);
    }

  private:
    static constexpr double kNotEnded = -1.0;

    struct Worker {
        int32_t task = kNone;
        bool idle = true;      // has not looked for a ticket yet, or has found none
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
        int32_t adopter = kNone;         // worker that has nothing left to do but adopt this task
    };

    bool queue_is_empty() const { return next_ticket_ == order_->size(); }

    void set_queue(const TaskGraph& graph, const std::vector<int32_t>& order, int num_workers) {
        graph_ = &graph;
        order_ = &order;
        ending_.reserve(order.size());
        workers_.resize(std::min<size_t>(num_workers, num_instructions(graph)));
        sleepers_.resize(graph.tasks.size());
        waits_.resize(graph.merges.size());
        timeline_.worker.resize(graph.tasks.size(), kNone);
        timeline_.start_us.resize(graph.tasks.size(), 0.0);
        timeline_.end_us.resize(graph.tasks.size(), kNotEnded);
    }

    // Handles the next event; false when there is none.
    bool advance() {
        const double stream_end_us =
            num_streams_ == 0
                ? kNever
                : std::max(now_,
                           rate_since_us_ + (streaming_.next().at - tiles_before_) * tile_us_);
        EventFifo& begins =
            first_streams_.next().at <= next_streams_.next().at ? first_streams_ : next_streams_;
        const double begin_us = begins.next().at;
        const double end_us = ending_.next().at;

        const double at_us = std::min({stream_end_us, begin_us, end_us});
        if (at_us == kNever) return false;
        now_ = at_us;
        if (at_us == stream_end_us) {
            const int32_t worker = streaming_.pop().worker;
            count_streams(task_of(worker), -1);
            end_stream(worker);
        } else if (at_us == begin_us) {
            const int32_t worker = begins.pop().worker;
            count_streams(task_of(worker), 1);
            const double tiles = std::max(num_tiles_of_mate(task_of(worker)), least_tiles_);
            streaming_.push({tiles_before_ + tiles, worker});
        } else {
            finish(ending_.pop().worker);
        }
        return true;
    }

    // What a partial adopts may not be there yet.
    void end_stream(int32_t worker) {
        const Task& partial = task_of(worker);
        double at_us = now_;
        if (partial.adopted != kNoTask) {
            const double adopted_us = timeline_.end_us[partial.adopted];
            if (adopted_us == kNotEnded) {
                sleepers_[partial.adopted].adopter = worker;
                return;
            }
            at_us = std::max(at_us, adopted_us + cost_.dependency_us);
        }
        ending_.push({at_us + partial_store_us(partial, cost_), worker});
    }

    // Begins a new rate. Between two of them no time is summed up: reductions, which change no
    // rate, move no partial by a rounding error, and workers that tie with reductions tie without.
    void count_streams(const Task& partial, int sign) {
        if (num_streams_ > 0) tiles_before_ += (now_ - rate_since_us_) / tile_us_;
        const int streams = sign * partial.num_mates;
        num_streams_ += streams;
        num_different_streams_ += static_cast<double>(streams) / partial.kv_sharing;
        if (num_streams_ == 0) num_different_streams_ = 0.0;  // rid of rounding errors
        rate_since_us_ = now_;
        tile_us_ = spread_ ? cost_.spread_tile_us(num_different_streams_)
                           : cost_.stream_tile_us(num_different_streams_);
    }

    // The first instructions: mates have workers side by side. Returns how many.
    int begin_side_by_side(size_t first) {
        take_ticket(static_cast<int32_t>(first));
        Worker& worker = workers_[first];
        if (worker.task == kNone) return 1;
        worker.num_mates = static_cast<int>(
            std::min<size_t>(graph_->tasks[worker.task].num_mates, workers_.size() - first));
        for (int mate = 1; mate < worker.num_mates; ++mate) {
            workers_[first + mate].task = worker.task;
            workers_[first + mate].idle = false;
        }
        return worker.num_mates;
    }

    const Task& task_of(int32_t worker) const { return graph_->tasks[workers_[worker].task]; }

    void take_ticket(int32_t index) {
        Worker& worker = workers_[index];
        if (queue_is_empty()) {
            worker.idle = true;
            return;
        }
        worker.idle = false;
        worker.follows = worker.task != kNone;
        worker.task = (*order_)[next_ticket_++];
        timeline_.worker[worker.task] = index;
        timeline_.start_us[worker.task] = now_;

        switch (graph_->tasks[worker.task].opcode) {
            case Opcode::kMlaPartial: {
                EventFifo& begins = worker.follows ? next_streams_ : first_streams_;
                begins.push({now_ + partial_lead_us(worker.follows, cost_), index});
                break;
            }
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
        const int32_t merge = graph_->tasks[reduction].merge;
        if (inputs_ended(merge)) {
            begin(reduction);
            return;
        }
        sleepers_[reduction].next_reduction = waits_[merge].first_reduction;
        waits_[merge].first_reduction = reduction;
    }

    // Otherwise the merge sleeps on an input that has not.
    bool inputs_ended(int32_t index) {
        const Merge& merge = graph_->merges[index];
        Wait& wait = waits_[index];
        if (wait.asleep) return false;
        for (; wait.num_seen < merge.num_inputs; ++wait.num_seen) {
            const int32_t input = graph_->input(merge, wait.num_seen);
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
        const Task& task = graph_->tasks[reduction];
        const double ready_us = waits_[task.merge].ready_us;
        const int32_t index = timeline_.worker[reduction];
        const double start_us = timeline_.start_us[reduction];
        const bool follows = workers_[index].follows && ready_us <= start_us;
        // Decoding is hidden by the wait, if there is one.
        const double decoded_us = start_us + (follows ? 0.0 : cost_.instruction_us);
        const double busy_us =
            reduction_us(graph_->num_inputs(task), task.num_rows, task.num_cols, follows, cost_);
        ending_.push({std::max(decoded_us, ready_us) + busy_us, index});
    }

    void finish(int32_t index) {
        const int32_t task = workers_[index].task;
        timeline_.end_us[task] = now_;
        if (const int32_t adopter = sleepers_[task].adopter; adopter != kNone) end_stream(adopter);
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

    const TaskGraph* graph_;
    const std::vector<int32_t>* order_;
    const CostModel& cost_;
    const double least_tiles_;  // that a partial takes the time of
    const bool spread_;         // see spread.h
    std::vector<Worker> workers_;
    std::vector<Sleepers> sleepers_;  // of each task
    std::vector<Wait> waits_;         // of each merge
    EventFifo first_streams_;         // begins of a worker's first partial, and of later ones:
    EventFifo next_streams_;          // each after a constant time, so in order
    EventHeap streaming_;             // ends of streams, in tiles on the scale of tiles_before_
    EventQueue ending_;               // ends of instructions
    Timeline timeline_;
    double now_;
    // Progress is counted in tiles that every streaming partial has advanced, so that a change of
    // rate moves no event: so many until the present rate began.
    double tiles_before_ = 0.0;
    double rate_since_us_ = 0.0;
    double tile_us_ = 0.0;
    int num_streams_ = 0;
    double num_different_streams_ = 0.0;  // streams that read the same KV count as one
    size_t next_ticket_ = 0;
};

Timeline simulate(const TaskGraph& graph,
                  const std::vector<int32_t>& order,
                  int num_workers,
                  const CostModel& cost) {
    return Simulation(graph, order, num_workers, cost).run();
}

LeafSimulation::LeafSimulation(const TaskGraph& leaves,
                               const std::vector<int32_t>& order,
                               int num_workers,
                               const CostModel& cost) {
    Simulation simulation(leaves, order, num_workers, cost);
    simulation.hand_out();
    auto handed_out = std::make_shared<Simulation>(simulation);
    timeline_ = simulation.run();
    if (num_instructions(leaves) <= static_cast<size_t>(num_workers)) {
        handed_out->set_ends(timeline_.end_us);
    }
    handed_out_ = std::move(handed_out);
}

Timeline LeafSimulation::with_reductions(const TaskGraph& graph,
                                         const std::vector<int32_t>& order,
                                         int num_workers) const {
    Simulation simulation = *handed_out_;
    simulation.extend(graph, order, num_workers);
    return simulation.run();
}

std::vector<int32_t> queue_order(const TaskGraph& graph) {
    std::vector<int32_t> order(graph.tasks.size());
    std::iota(order.begin(), order.end(), 0);
    return order;
}

}  // namespace mla
