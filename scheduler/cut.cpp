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
    task.num_rows = std::min(problem.sequences[sequence].num_rows, kMaxRows);
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
        all_work += static_cast<double>(problem.num_tiles(sequence)) * line.row_groups;
    }
    std::vector<Line> lines;
    for (auto& [row_groups, line] : by_groups) {
        double work = 0.0;
        for (const int32_t sequence : line.sequences) {
            work += static_cast<double>(problem.num_tiles(sequence)) * row_groups;
        }
        line.num_gangs =
            std::max(1, static_cast<int>(problem.num_workers * (work / all_work) / row_groups));
        lines.push_back(std::move(line));
    }
    return lines;
}

// Walks a line and hands out tiles to one gang after the other.
class LineCutter {
  public:
    LineCutter(const Problem& problem,
               const CostModel& cost,
               double tile_us,
               int min_tiles,
               const Line& line)
        : problem_(problem),
          cost_(cost),
          num_gangs_(line.num_gangs),
          min_tiles_(min_tiles),
          tile_us_(tile_us),
          line_(line.sequences) {}

    struct GangPiece {
        Piece piece;
        int32_t gang;
        bool whole;  // of its sequence: no reduction waits for it
    };

    std::vector<GangPiece> cut() {
        double total_us = tile_us_;  // against rounding
        for (const int32_t sequence : line_) {
            total_us += std::max(cost_.partial_fixed_us, cost_.partial_next_us) +
                        problem_.num_tiles(sequence) * tile_us_;
        }
        double infeasible_us = 0.0;
        double feasible_us = total_us;  // one gang could do it all
        for (int i = 0; i < kBisections; ++i) {
            const double middle_us = (infeasible_us + feasible_us) / 2;
            (walk(middle_us, [](const GangPiece&) {}) ? feasible_us : infeasible_us) = middle_us;
        }
        std::vector<GangPiece> pieces;
        // Times that differ by more than a double's precision can defeat even one gang.
        if (!walk(feasible_us, [&pieces](const GangPiece& piece) { pieces.push_back(piece); })) {
            pieces.clear();
        }
        return pieces;
    }

  private:
    template <class Emit>
    bool walk(double capacity_us, Emit&& emit) const {
        int32_t gang = 0;
        double used_us = 0.0;
        for (const int32_t sequence : line_) {
            const int32_t tiles = problem_.num_tiles(sequence);
            int32_t begin = 0;
            while (begin < tiles) {
                if (gang == num_gangs_) return false;
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

    const Problem& problem_;
    const CostModel& cost_;
    const int num_gangs_;
    const int min_tiles_;
    const double tile_us_;
    const std::vector<int32_t>& line_;
};

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
    std::vector<LineCutter::GangPiece> line;
    int32_t first_gang = 0;
    for (const Line& own : lines) {
        const auto pieces = LineCutter(problem, cost, tile_us, min_tiles, own).cut();
        if (pieces.empty()) return {};
        for (LineCutter::GangPiece piece : pieces) {
            piece.gang += first_gang;
            line.push_back(piece);
        }
        first_gang += own.num_gangs;
    }

    // A gang runs pieces that somebody waits for before whole sequences, so that their
    // reductions overlap with the rest of the work.
    std::stable_sort(line.begin(), line.end(), [](const auto& a, const auto& b) {
        return a.gang != b.gang ? a.gang < b.gang : a.whole < b.whole;
    });
    std::vector<double> start_us(line.size(), 0.0);
    for (size_t i = 1; i < line.size(); ++i) {
        if (line[i].gang != line[i - 1].gang) continue;
        start_us[i] =
            start_us[i - 1] + cost.partial_next_us + num_tiles(line[i - 1].piece) * tile_us;
    }

    std::vector<int32_t> by_position(line.size());
    std::iota(by_position.begin(), by_position.end(), 0);
    std::sort(by_position.begin(), by_position.end(), [&line](int32_t a, int32_t b) {
        const Piece& left = line[a].piece;
        const Piece& right = line[b].piece;
        return left.sequence != right.sequence ? left.sequence < right.sequence
                                               : left.begin_tile < right.begin_tile;
    });

    Cut cut;
    cut.first_piece.assign(problem.num_sequences() + 1, 0);
    for (const int32_t i : by_position) {
        cut.pieces.push_back(line[i].piece);
        ++cut.first_piece[line[i].piece.sequence + 1];
    }
    std::partial_sum(cut.first_piece.begin(), cut.first_piece.end(), cut.first_piece.begin());

    cut.start_order.resize(line.size());
    std::iota(cut.start_order.begin(), cut.start_order.end(), 0);
    std::stable_sort(cut.start_order.begin(), cut.start_order.end(), [&](int32_t a, int32_t b) {
        return start_us[by_position[a]] < start_us[by_position[b]];
    });
    return cut;
}

}  // namespace mla
