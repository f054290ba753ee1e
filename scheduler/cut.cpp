#include "scheduler/cut.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "scheduler/task_cost.h"

namespace mla {

namespace {

constexpr int kBisections = 20;  // of a finish time; leaves less than a tile

// One merge as the finish of a plan sees it: the flag, the reduction, some bytes.
double merge_us(const CostModel& cost) {
    constexpr double kTypicalInputKib = 32;
    return cost.dependency_us + cost.reduction_fixed_us + cost.reduction_kib_us * kTypicalInputKib;
}

int32_t num_tiles(const Piece& piece) { return piece.end_tile - piece.begin_tile; }

// Long pieces first keeps the tail short whoever takes them (LPT). Stable: the pieces of
// one sequence stay together.
void start_longest_first(Cut& cut) {
    cut.start_order.resize(cut.pieces.size());
    std::iota(cut.start_order.begin(), cut.start_order.end(), 0);
    std::stable_sort(cut.start_order.begin(), cut.start_order.end(), [&cut](int32_t a, int32_t b) {
        return num_tiles(cut.pieces[a]) > num_tiles(cut.pieces[b]);
    });
}

// Cuts a sequence into `count` nearly equal pieces.
void append_pieces(Cut& cut, int sequence, int tiles, int count) {
    int32_t begin = 0;
    for (int64_t piece = 1; piece <= count; ++piece) {
        const auto end = static_cast<int32_t>(piece * tiles / count);
        cut.pieces.push_back({sequence, begin, end});
        begin = end;
    }
}

Cut cut_into(const Problem& problem, const std::vector<int32_t>& counts) {
    Cut cut;
    cut.first_piece.reserve(counts.size() + 1);
    cut.pieces.reserve(std::accumulate(counts.begin(), counts.end(), size_t{0}));
    cut.first_piece.push_back(0);
    for (int sequence = 0; sequence < problem.num_sequences(); ++sequence) {
        append_pieces(cut, sequence, problem.num_tiles(sequence), counts[sequence]);
        cut.first_piece.push_back(static_cast<int32_t>(cut.pieces.size()));
    }
    start_longest_first(cut);
    return cut;
}

// How many equal pieces a sequence needs to end by a deadline.
class PieceCounter {
  public:
    PieceCounter(const CostModel& cost, double tile_us)
        : fixed_us_(cost.launch_us + cost.partial_fixed_us),
          tile_us_(tile_us),
          merge_us_(merge_us(cost)) {}

    // 0: impossible.
    int count(int tiles, double deadline_us) const {
        if (fixed_us_ + tiles * tile_us_ <= deadline_us) return 1;
        const double tiles_per_piece = (deadline_us - fixed_us_ - merge_us_) / tile_us_;
        if (tiles_per_piece < 1.0) return 0;
        const int count = std::max(2, static_cast<int>(std::ceil(tiles / tiles_per_piece)));
        return count <= tiles ? count : 0;
    }

    double upper_bound_us(int tiles) const { return fixed_us_ + tiles * tile_us_; }

  private:
    double fixed_us_;
    double tile_us_;
    double merge_us_;
};

// Workers for each row group of a sequence that shall end by a deadline, as few as can be. 0:
// impossible.
int clustered_workers(const Problem& problem,
                      const CostModel& cost,
                      double tile_us,
                      int cluster_ctas,
                      bool in_one_if_possible,
                      int sequence,
                      double deadline_us) {
    Task task;
    task.num_rows = problem.rows_from(sequence, 0);
    task.to_output = true;
    const int tiles = problem.num_tiles(sequence);
    const double begin_us = cost.launch_us + cost.partial_fixed_us;
    // In one cluster ...
    int in_one = 0;
    for (task.num_mates = 1; task.num_mates <= std::min(tiles, cluster_ctas); task.num_mates *= 2) {
        const double stream_us = ceil_div(tiles, task.num_mates) * tile_us;
        if (begin_us + stream_us + partial_store_us(task, cost) > deadline_us) continue;
        in_one = task.num_mates;
        break;
    }
    if (in_one_if_possible && in_one > 0) return in_one;
    // ... or in several, with a reduction.
    task.num_mates = cluster_ctas;
    const double room_us = deadline_us - begin_us - partial_store_us(task, cost) - merge_us(cost);
    if (room_us < tile_us) return in_one;
    const double most_tiles = std::min<double>(room_us / tile_us, tiles);
    const int in_several = ceil_div(tiles, static_cast<int>(most_tiles));
    return in_one > 0 ? std::min(in_one, in_several) : in_several;
}

// Groups of mates, the largest first.
void append_clusters(Cut& cut, int sequence, int tiles, int workers, int cluster_ctas) {
    int32_t begin = 0;
    for (int64_t given = 0; given < workers;) {
        int mates = cluster_ctas;
        while (mates > workers - given) mates /= 2;
        given += mates;
        const auto end = static_cast<int32_t>(given * tiles / workers);
        cut.pieces.push_back({sequence, begin, end, mates});
        begin = end;
    }
}

// The sequences of one number of row groups, and the gangs that work on them: as many of the
// workers as is their share of the work.
struct Line {
    int row_groups = 0;
    int num_gangs = 0;
    std::vector<int32_t> sequences;
    std::vector<int32_t> tiles;  // of each
};

std::vector<Line> lines_of(const Problem& problem, LineOrder order) {
    std::vector<int32_t> sequences(problem.num_sequences());
    std::iota(sequences.begin(), sequences.end(), 0);
    if (order == LineOrder::kLongestFirst) {
        std::stable_sort(sequences.begin(), sequences.end(), [&problem](int32_t a, int32_t b) {
            return problem.sequences[a].length > problem.sequences[b].length;
        });
    }
    std::map<int, Line> by_groups;
    double all_work = 0.0;
    for (const int32_t sequence : sequences) {
        Line& line = by_groups[problem.row_groups(sequence)];
        line.row_groups = problem.row_groups(sequence);
        line.sequences.push_back(sequence);
        line.tiles.push_back(problem.num_tiles(sequence));
        all_work += static_cast<double>(line.tiles.back()) * line.row_groups;
    }
    std::vector<Line> lines;
    for (auto& [row_groups, line] : by_groups) {
        double work = 0.0;
        for (const int32_t tiles : line.tiles) work += static_cast<double>(tiles) * row_groups;
        line.num_gangs =
            std::max(1, static_cast<int>(problem.num_workers * (work / all_work) / row_groups));
        lines.push_back(std::move(line));
    }
    return lines;
}

struct GangPiece {
    Piece piece;
    int32_t gang;
    bool whole;  // of its sequence: no reduction waits for it
};

// Walks a line and hands out tiles to one gang after the other.
class LineCutter {
  public:
    LineCutter(const CostModel& cost, double tile_us, int min_tiles, const Line& line)
        : cost_(cost), tile_us_(tile_us), min_tiles_(min_tiles), line_(line) {}

    // Appends the pieces. False if there is no such cut.
    bool cut(int32_t first_gang, std::vector<GangPiece>& pieces) const {
        const auto [least_fixed_us, most_fixed_us] =
            std::minmax(cost_.partial_fixed_us, cost_.partial_next_us);
        double least_us = 0.0;
        double total_us = tile_us_;  // against rounding
        for (const int32_t tiles : line_.tiles) {
            least_us += least_fixed_us + tiles * tile_us_;
            total_us += most_fixed_us + tiles * tile_us_;
        }
        // A full gang leaves less than a fixed cost and 2 * min_tiles_ tiles of its time unused,
        // and what it leaves of a sequence has another fixed cost.
        const double wasted_us = 2 * (most_fixed_us + min_tiles_ * tile_us_);
        // For many capacities the sums tell, without a walk.
        const auto fits = [&](double capacity_us) {
            if (line_.num_gangs * capacity_us < least_us * (1 - kMargin)) return false;
            if ((line_.num_gangs - 1) * (capacity_us - wasted_us) > total_us * (1 + kMargin)) {
                return true;
            }
            return walk(capacity_us, [](const GangPiece&) {});
        };
        double infeasible_us = 0.0;
        double feasible_us = total_us;  // one gang could do it all
        for (int i = 0; i < kBisections; ++i) {
            const double middle_us = (infeasible_us + feasible_us) / 2;
            (fits(middle_us) ? feasible_us : infeasible_us) = middle_us;
        }
        pieces.reserve(pieces.size() + line_.sequences.size() + line_.num_gangs);
        // Times that differ by more than a double's precision can defeat even one gang.
        return walk(feasible_us, [&](GangPiece piece) {
            piece.gang += first_gang;
            pieces.push_back(piece);
        });
    }

  private:
    static constexpr double kMargin = 1e-9;  // far above the rounding errors of sums

    template <class Emit>
    bool walk(double capacity_us, Emit&& emit) const {
        int32_t gang = 0;
        double used_us = 0.0;
        for (size_t i = 0; i < line_.tiles.size(); ++i) {
            const int32_t sequence = line_.sequences[i];
            const int32_t tiles = line_.tiles[i];
            int32_t begin = 0;
            while (begin < tiles) {
                if (gang == line_.num_gangs) return false;
                const double fixed_us =
                    used_us == 0.0 ? cost_.partial_fixed_us : cost_.partial_next_us;
                const double room = (capacity_us - used_us - fixed_us) / tile_us_;
                const int32_t left = tiles - begin;
                if (room >= left) {
                    emit(GangPiece{{sequence, begin, tiles}, gang, begin == 0});
                    used_us += fixed_us + left * tile_us_;
                    break;
                }
                const int32_t taken =
                    std::min(static_cast<int32_t>(std::max(0.0, room)), left - min_tiles_);
                if (taken >= min_tiles_) {
                    emit(GangPiece{{sequence, begin, begin + taken}, gang, false});
                    begin += taken;
                } else if (used_us == 0.0) {
                    return false;  // not even an empty gang has room
                }
                ++gang;
                used_us = 0.0;
            }
        }
        return true;
    }

    const CostModel& cost_;
    const double tile_us_;
    const int min_tiles_;
    const Line& line_;
};

// f(first, last) for the pieces of each gang.
template <class F>
void for_each_gang(std::vector<GangPiece>& line, F f) {
    for (auto first = line.begin(); first != line.end();) {
        const auto last = std::find_if(
            first, line.end(), [first](const GangPiece& each) { return each.gang != first->gang; });
        f(first, last);
        first = last;
    }
}

// When pieces run, if gangs start together and each runs its own in their order.
struct PieceTimes {
    std::vector<double> start_us, end_us;
};

// Puts the pieces into the cut. Those of a sequence are on one gang after the other, so in their
// order.
PieceTimes run_gangs(const CostModel& cost,
                     double tile_us,
                     std::vector<GangPiece>& line,
                     Cut& cut) {
    std::vector<int32_t> next_piece = cut.first_piece;
    cut.pieces.resize(line.size());
    PieceTimes times{std::vector<double>(line.size()), std::vector<double>(line.size())};
    for_each_gang(line, [&](auto first, auto last) {
        double gang_us = 0.0;
        for (auto each = first; each != last; ++each) {
            const int32_t piece = next_piece[each->piece.sequence]++;
            cut.pieces[piece] = each->piece;
            times.start_us[piece] = gang_us;
            gang_us += cost.partial_next_us + num_tiles(each->piece) * tile_us;
            times.end_us[piece] = gang_us;
        }
    });
    return times;
}

// Of sequences that are cut in two, the first piece adopts the second one's result where that is
// there in time. False, and none does, unless that spares most split sequences a reduction: who
// adopts ends late, and the reductions of the others find fewer workers.
bool adopt_most(const CostModel& cost, const PieceTimes& times, Cut& cut) {
    int num_split = 0;
    std::vector<int32_t> adopted;
    for (size_t sequence = 0; sequence + 1 < cut.first_piece.size(); ++sequence) {
        const int32_t head = cut.first_piece[sequence], tail = head + 1;
        const int num_pieces = cut.num_pieces(static_cast<int>(sequence));
        num_split += num_pieces > 1;
        // Earlier in the queue, too.
        if (num_pieces == 2 && times.start_us[tail] < times.start_us[head] &&
            times.end_us[tail] + cost.dependency_us + cost.adopt_fixed_us <= times.end_us[head]) {
            adopted.push_back(tail);
        }
    }
    constexpr double kMost = 0.6;
    if (static_cast<double>(adopted.size()) <= kMost * num_split) return false;
    for (const int32_t tail : adopted) cut.pieces[tail].is_adopted = true;
    return true;
}

}  // namespace

Cut cut_unsplit(const Problem& problem) {
    return cut_into(problem, std::vector<int32_t>(problem.num_sequences(), 1));
}

Cut cut_fixed(const Problem& problem, int split_tiles) {
    Cut cut;
    cut.first_piece.push_back(0);
    for (int sequence = 0; sequence < problem.num_sequences(); ++sequence) {
        const int tiles = problem.num_tiles(sequence);
        for (int begin = 0; begin < tiles;) {
            const int end = tiles - begin > split_tiles ? begin + split_tiles : tiles;
            cut.pieces.push_back({sequence, begin, end});
            begin = end;
        }
        cut.first_piece.push_back(static_cast<int32_t>(cut.pieces.size()));
    }
    start_longest_first(cut);
    return cut;
}

Cut cut_even(const Problem& problem, const CostModel& cost, int max_gangs) {
    const double tile_us = cost.tile_us(max_gangs * problem.gang_size, problem.kv_sharing);
    const PieceCounter counter(cost, tile_us);

    std::vector<int32_t> counts(problem.num_sequences());
    const auto fits = [&](double deadline_us) {
        int64_t gangs = 0;
        for (int sequence = 0; sequence < problem.num_sequences(); ++sequence) {
            counts[sequence] = counter.count(problem.num_tiles(sequence), deadline_us);
            if (counts[sequence] == 0) return false;
            gangs += int64_t{counts[sequence]} * problem.gangs_per_piece(sequence);
        }
        return gangs <= max_gangs;
    };
    double infeasible_us = 0.0;
    double feasible_us = counter.upper_bound_us(problem.longest());
    for (int i = 0; i < kBisections; ++i) {
        const double middle_us = (infeasible_us + feasible_us) / 2;
        (fits(middle_us) ? feasible_us : infeasible_us) = middle_us;
    }
    fits(feasible_us);
    return cut_into(problem, counts);
}

Cut cut_into_clusters(const Problem& problem,
                      const CostModel& cost,
                      int cluster_ctas,
                      bool in_one_if_possible,
                      int max_workers) {
    const double tile_us = cost.tile_us(max_workers, problem.kv_sharing);
    std::vector<int32_t> workers(problem.num_sequences());
    const auto fits = [&](double deadline_us) {
        int64_t all = 0;
        for (int sequence = 0; sequence < problem.num_sequences(); ++sequence) {
            workers[sequence] = clustered_workers(
                problem, cost, tile_us, cluster_ctas, in_one_if_possible, sequence, deadline_us);
            if (workers[sequence] == 0) return false;
            all += int64_t{workers[sequence]} * problem.row_groups(sequence);
        }
        return all <= max_workers;
    };
    double infeasible_us = 0.0;
    double feasible_us = PieceCounter(cost, tile_us).upper_bound_us(problem.longest()) + tile_us;
    if (!fits(feasible_us)) return {};
    for (int i = 0; i < kBisections; ++i) {
        const double middle_us = (infeasible_us + feasible_us) / 2;
        (fits(middle_us) ? feasible_us : infeasible_us) = middle_us;
    }
    fits(feasible_us);

    Cut cut;
    cut.first_piece.push_back(0);
    for (int sequence = 0; sequence < problem.num_sequences(); ++sequence) {
        append_clusters(
            cut, sequence, problem.num_tiles(sequence), workers[sequence], cluster_ctas);
        cut.first_piece.push_back(static_cast<int32_t>(cut.pieces.size()));
    }
    start_longest_first(cut);
    std::stable_sort(cut.start_order.begin(), cut.start_order.end(), [&cut](int32_t a, int32_t b) {
        return cut.pieces[a].num_mates > cut.pieces[b].num_mates;
    });
    return cut;
}

Cut cut_line(const Problem& problem, const CostModel& cost, int min_tiles, LineOrder order) {
    const std::vector<Line> lines = lines_of(problem, order);
    int num_streams = 0;
    for (const Line& line : lines) num_streams += line.num_gangs * line.row_groups;
    const double tile_us = cost.tile_us(num_streams, problem.kv_sharing);
    std::vector<GangPiece> line;
    int32_t first_gang = 0;
    for (const Line& own : lines) {
        if (!LineCutter(cost, tile_us, min_tiles, own).cut(first_gang, line)) return {};
        first_gang += own.num_gangs;
    }

    Cut cut;
    cut.first_piece.assign(problem.num_sequences() + 1, 0);
    for (const GangPiece& each : line) ++cut.first_piece[each.piece.sequence + 1];
    std::partial_sum(cut.first_piece.begin(), cut.first_piece.end(), cut.first_piece.begin());

    // On the line a gang's pieces are a tail, whole sequences, and a head, which can adopt its
    // tail.
    PieceTimes times = run_gangs(cost, tile_us, line, cut);
    if (!adopt_most(cost, times, cut)) {
        // Pieces that a reduction waits for come before whole sequences.
        for_each_gang(line, [](auto first, auto last) {
            std::stable_partition(first, last, [](const GangPiece& each) { return !each.whole; });
        });
        times = run_gangs(cost, tile_us, line, cut);
    }
    cut.start_order.resize(line.size());
    std::iota(cut.start_order.begin(), cut.start_order.end(), 0);
    std::stable_sort(
        cut.start_order.begin(), cut.start_order.end(), [&times](int32_t a, int32_t b) {
            return times.start_us[a] < times.start_us[b];
        });
    return cut;
}

}  // namespace mla
