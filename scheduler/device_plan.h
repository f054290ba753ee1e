// Planning of one step by one CTA, from lengths that live on the GPU: no search and no simulation,
// but the same kinds of cuts as the host planner's, chosen by closed formulas. The code is written
// for a team of threads; on the host the team is one thread, and makes the same queue, word for
// word. (Integers only; and short rather than wide: a kernel that runs once a step waits for its
// own code.)
//
//   read     lengths and rows of every sequence; bad lengths are clamped, counted
//   choose   the length of even pieces; or of mates' shares, where none need be merged; or one
//            line of all sequences, cut into equal shares
//   cut      pieces and reductions of every sequence, and their places
//   sort     partials, the longest first, or those with the most mates
//   write    partials, reductions over runs of slots, fills; then end marks
#pragma once

#include <cstdint>

#include "scheduler/device_plan_choice.h"
#include "scheduler/device_plan_cut.h"
#include "scheduler/device_plan_problem.h"
#include "scheduler/device_plan_requests.h"
#include "scheduler/device_plan_state.h"
#include "scheduler/device_plan_words.h"

namespace mla {

// Team: rank() of size() threads, in groups: lane() of lanes(), group() of num_groups();
// sync(). Of the group: sum(CutTotals), sum(MatesTotals). Of the team, each a sync as well:
// total(BatchTotals), total(CutTotals); least(values, n), the last index of the least;
// prefix_sums(values, n), exclusive, in place, the total behind; sort(state, n), places of keys.
// write(to, place, head) is called by whole groups; nothing is written where `place` is negative.
template <class Team>
class DevicePlanner {
  public:
    MLA_HOST_DEVICE DevicePlanner(const Team& team,
                                  const DevicePlanProblem& problem,
                                  const DevicePlanState& state)
        : team_(team), p_(problem), s_(state), requests_(problem, state) {}

    // Writes instructions and end marks; header: see DevicePlanHeader. Returns the number of bad
    // lengths.
    MLA_HOST_DEVICE int run(int32_t* words, int32_t* header) {
        const BatchTotals batch = read();
        const Cut made = cut(choose(batch));
        counts_ = count(made);
        const bool sorted = sort(batch, made);
        write(made, sorted, words);
        if (team_.rank() == 0) {
            header[kHeaderInstructions] = counts_.noops + counts_.items;
            header[kHeaderSlots] = counts_.slots;
            header[kHeaderBadLengths] = batch.num_bad;
            header[kHeaderBadRequest] = batch.num_bad > 0 ? batch.bad_request : 0;
            header[kHeaderBadLength] = batch.num_bad > 0 ? p_.seq_lens[batch.bad_request] : 0;
        }
        return batch.num_bad;
    }

  private:
    struct Choice {
        EvenCut even;
        CutTotals totals;
        uint32_t log2_mates;
        int noops;  // that begin the queue, if nothing but partials follows
        bool is_line;
    };
    struct Cut {
        EvenCut even;
        LineCut line;
        uint32_t log2_mates;  // the most of a row group; 0: none have any
        int noops;            // as in Choice
        bool is_line;

        // The pieces of a sequence are its mates.
        MLA_HOST_DEVICE bool has_mates() const { return log2_mates > 0; }

        MLA_HOST_DEVICE uint32_t longest_piece(uint32_t longest) const {
            return device_plan::smaller(longest,
                                        is_line ? line.longest_piece() : even.longest_whole);
        }
    };
    struct Tiles {
        int32_t begin, end;
    };
    // Instructions are numbered: partials of every sequence, then reductions and fills of every
    // sequence, then fills of padding. No-ops, which come first, have no number.
    struct Counts {
        int partials, slots, of_sequences, items, noops;
    };

    MLA_HOST_DEVICE BatchTotals read() {
        BatchTotals own;
        MLA_SHORT_LOOP
        for (int i = team_.rank(); i < p_.num_sequences(); i += team_.size()) {
            const int request = requests_.request_of(i);
            const int stated = p_.seq_lens[request];
            const int length = device_plan::clamp(stated, 0, p_.limit_of(request));
            if (stated != length && i < p_.num_requests) {
                ++own.num_bad;
                own.bad_request = device_plan::smaller(own.bad_request, static_cast<uint32_t>(i));
            }
            const int rows = requests_.tokens_of(request) * p_.num_heads;
            s_.rows[i] = rows;
            s_.length[i] = rows > 0 ? length : 0;
            const auto shape = SequenceShape::of(rows > 0 ? length : 0, p_.groups_of(rows));
            s_.shape[i] = shape;
            s_.line[i] = shape.tiles() > 0 ? shape.tiles() * 16 + p_.constants.line_lead : 0;
            if (shape.tiles() > 0) own.groups += shape.groups();
            own.tiles +=
                device_plan::smaller(shape.tiles(), p_.constants.most_tiles) * shape.groups();
            own.longest = device_plan::larger(own.longest, shape.tiles());
        }
        return team_.total(own);
    }

    // ---- the choice -----------------------------------------------------------------

    MLA_HOST_DEVICE Choice choose(const BatchTotals& batch) {
        if (!p_.balances()) return {EvenCut(p_.split_tiles, 0), {}, 0, 0, false};
        const Estimate estimate(p_, batch);
        MLA_SHORT_LOOP
        for (int i = team_.group(); i < device_plan::kCandidates; i += team_.num_groups()) {
            uint32_t ns = Estimate::kNever;
            if (estimate.may_be_best(i)) {
                const EvenCut even(estimate.tiles(i), p_.constants.margin);
                const CutTotals totals = team_.sum(totals_of(even));
                ns = i == 0 ? estimate.line_ns(totals) : estimate.pieces_ns(even, totals);
                uint32_t log2_mates = 0;
                int noops = i == 0 ? 0 : estimate.noops(totals);
                if (p_.has_clusters() && i > 0) {
                    const MatesTotals mates = team_.sum(mates_of(even));
                    const uint32_t mates_ns = estimate.mates_ns(mates);
                    if (mates_ns < ns) {
                        ns = mates_ns;
                        log2_mates = mates.most_log2;
                        noops = estimate.noops(mates);
                    }
                }
                if (team_.lane() == 0) s_.candidates[i] = {even, totals, log2_mates, noops};
            }
            if (team_.lane() == 0) s_.candidate_ns[i] = ns;
        }
        const int best = team_.least(s_.candidate_ns, device_plan::kCandidates);
        const Candidate& chosen = s_.candidates[best];
        return {chosen.even, chosen.totals, chosen.log2_mates, chosen.noops, best == 0};
    }

    MLA_HOST_DEVICE CutTotals totals_of(const EvenCut& even) const {
        CutTotals totals;
        MLA_SHORT_LOOP
        for (int i = team_.lane(); i < p_.num_sequences(); i += team_.lanes()) {
            const SequenceShape shape = s_.shape[i];
            if (shape.tiles() >= even.nearly_full()) totals.full += shape.groups();
            totals.add(even.num_pieces(shape.tiles()), shape.groups());
        }
        return totals;
    }

    MLA_HOST_DEVICE MatesTotals mates_of(const EvenCut& even) const {
        MatesTotals totals;
        MLA_SHORT_LOOP
        for (int i = team_.lane(); i < p_.num_sequences(); i += team_.lanes()) {
            const uint32_t tiles = s_.shape[i].tiles();
            if (tiles == 0) continue;
            const uint32_t log2 = even.log2_mates(tiles, p_.cluster_ctas);
            totals.mates += s_.shape[i].groups() << log2;
            totals.most_log2 = device_plan::larger(totals.most_log2, log2);
            totals.most_tiles = device_plan::larger(totals.most_tiles, ((tiles - 1) >> log2) + 1);
        }
        return totals;
    }

    // ---- cutting --------------------------------------------------------------------

    // Pieces and reductions of every sequence, and where its instructions and slots begin.
    MLA_HOST_DEVICE Cut cut(const Choice& choice) {
        const int n = p_.num_sequences();
        Cut made{choice.even, LineCut(), choice.log2_mates, choice.noops, choice.is_line};
        CutTotals totals = choice.totals;
        if (choice.is_line) totals = cut_line(made.line);
        const uint32_t eighths = merged_eighths(p_, totals);
        MLA_SHORT_LOOP
        for (int i = team_.rank(); i < n; i += team_.size()) {
            const SequenceShape shape = s_.shape[i];
            uint32_t pieces = choice.is_line ? s_.pieces[i] : choice.even.num_pieces(shape.tiles());
            if (made.has_mates() && pieces > 0) {
                pieces = 1u << choice.even.log2_mates(shape.tiles(), p_.cluster_ctas);
            }
            const bool merges = pieces > 1 && !made.has_mates();
            const uint32_t partials = pieces * shape.groups();
            s_.pieces[i] = pieces;
            s_.sums[i] = partials;
            s_.sums[n + i] = merges ? partials : 0;
            s_.sums[2 * n + i] = merges ? slice(i, pieces, eighths) : requests_.begins_fill(i);
        }
        team_.sync();
        team_.prefix_sums(s_.sums, 3 * n);
        return made;
    }

    // The line's cuts inside of every sequence.
    MLA_HOST_DEVICE CutTotals cut_line(LineCut& line) {
        const int n = p_.num_sequences();
        team_.prefix_sums(s_.line, n);
        line = LineCut(p_, s_.line[n]);
        CutTotals own;
        MLA_SHORT_LOOP
        for (int i = team_.rank(); i < n; i += team_.size()) {
            const SequenceShape shape = s_.shape[i];
            uint32_t pieces = 0;
            if (shape.tiles() > 0) {
                const auto cuts = line.inside(s_.line[i], s_.line[i + 1], shape.tiles());
                s_.first_cut[i] = cuts.first;
                pieces = cuts.count + 1;
            }
            s_.pieces[i] = pieces;
            own.add(pieces, shape.groups());
        }
        return team_.total(own);
    }

    // Reductions of a sequence.
    MLA_HOST_DEVICE uint32_t slice(int sequence, uint32_t pieces, uint32_t eighths) const {
        const uint32_t rows = s_.rows[sequence];
        const uint32_t before_last = s_.shape[sequence].groups() - 1;
        const uint32_t whole_rows = p_.group_rows();
        const uint32_t group_rows = before_last > 0 ? whole_rows : rows;
        const Slices slices = p_.balances() ? Slices::of(p_, pieces, group_rows, eighths)
                                            : Slices::batch_invariant(p_, pieces, group_rows);
        s_.slices[sequence] = slices.pack();
        return slices.num_of(p_, rows - before_last * whole_rows) +
               (before_last > 0 ? before_last * slices.num_of(p_, whole_rows) : 0);
    }

    MLA_HOST_DEVICE Counts count(const Cut& cut) const {
        const int n = p_.num_sequences();
        Counts counts;
        counts.partials = s_.sums[n];
        counts.slots = s_.sums[2 * n] - counts.partials;
        counts.of_sequences = s_.sums[3 * n] - counts.slots;
        counts.items = counts.of_sequences + p_.num_kv_heads * requests_.padding_fills();
        counts.noops = counts.items == counts.partials ? cut.noops : 0;
        return counts;
    }

    // The last sequence whose sum is not larger.
    MLA_HOST_DEVICE int find(const uint32_t* sums, uint32_t at) const {
        uint32_t found = 0;
        const uint32_t n = p_.num_sequences();
        MLA_SHORT_LOOP
        for (uint32_t step = p_.constants.top_step; step > 0; step /= 2) {
            if (found + step < n && sums[found + step] <= at) found += step;
        }
        return static_cast<int>(found);
    }

    MLA_HOST_DEVICE Tiles tiles_of_piece(const Cut& cut, int sequence, uint32_t piece) const {
        const auto tiles = static_cast<int32_t>(s_.shape[sequence].tiles());
        Tiles found{0, tiles};
        if (cut.has_mates()) {
            const int log2 = 31 - __builtin_clz(s_.pieces[sequence]);
            found.begin = static_cast<int32_t>(piece * tiles >> log2);
            found.end = static_cast<int32_t>((piece + 1) * tiles >> log2);
            return found;
        }
        if (!cut.is_line) {
            found.begin = static_cast<int32_t>(piece * cut.even.tiles);
            if (piece + 1 < s_.pieces[sequence]) {
                found.end = found.begin + static_cast<int32_t>(cut.even.tiles);
            }
            return found;
        }
        const uint32_t end_cut = s_.first_cut[sequence] + piece, at = s_.line[sequence];
        if (piece > 0) found.begin = cut.line.tile(end_cut - 1, at);
        if (piece + 1 < s_.pieces[sequence]) found.end = cut.line.tile(end_cut, at);
        return found;
    }

    // ---- partials ---------------------------------------------------------------------

    struct Partial {
        int group;
        int piece;
        Tiles tiles;
    };
    // Those of a sequence are numbered piece by piece, and row group by row group; but mates of a
    // row group are neighbours.
    MLA_HOST_DEVICE Partial partial(const Cut& cut, int number, int sequence) const {
        const uint32_t index = number - s_.sums[sequence];
        const uint32_t inner = cut.has_mates() ? s_.pieces[sequence] : s_.shape[sequence].groups();
        const uint32_t outer_index = index / p_.constants.small[inner];
        const uint32_t inner_index = index - outer_index * inner;
        const uint32_t piece = cut.has_mates() ? inner_index : outer_index;
        const uint32_t group = cut.has_mates() ? outer_index : inner_index;
        return {
            static_cast<int>(group), static_cast<int>(piece), tiles_of_piece(cut, sequence, piece)};
    }

    // Places for partials, where those are not their numbers; else false. Workers that take one
    // each start all of them at once, and pieces of a fixed length are equal. But mates must be in
    // one cluster: those of larger groups come first.
    MLA_HOST_DEVICE bool sort(const BatchTotals& batch, const Cut& cut) {
        const uint32_t partials = counts_.partials;
        const bool in_order = cut.has_mates() ? partials == batch.groups << cut.log2_mates
                                              : partials <= static_cast<uint32_t>(p_.num_workers);
        if (!p_.balances() || in_order) return false;
        // Classes of lengths end at multiples of a power of two.
        const int shift = 32 - __builtin_clz(cut.longest_piece(batch.longest) | 1);
        MLA_SHORT_LOOP
        for (int i = team_.rank(); i < counts_.partials; i += team_.size()) {
            const int sequence = find(s_.sums, i);
            uint32_t length = s_.pieces[sequence];
            if (!cut.has_mates()) {
                const Tiles tiles = partial(cut, i, sequence).tiles;
                length = (tiles.end - tiles.begin) * device_plan::kKeys >> shift;
            }
            const uint32_t key =
                device_plan::kKeys - 1 - device_plan::smaller(length, device_plan::kKeys - 1u);
            s_.keys[i] = sequence * device_plan::kKeys + key;
        }
        team_.sync();
        team_.sort(s_, counts_.partials);
        return true;
    }

    // ---- words ----------------------------------------------------------------------

    MLA_HOST_DEVICE void write(const Cut& cut, bool sorted, int32_t* words) const {
        const int noops = counts_.noops, items = counts_.items;
        MLA_SHORT_LOOP
        for (int i = team_.rank() - noops; i - team_.lane() < items; i += team_.size()) {
            int place = i < items ? noops + i : -1;
            InstructionHead head;
            if (i < 0) {
                head = noop(noops + i);
            } else if (i < counts_.partials) {
                if (sorted) place = noops + s_.places[i];
                head = make_partial(
                    cut, i, sorted ? s_.keys[i] / device_plan::kKeys : find(s_.sums, i));
            } else if (i < counts_.of_sequences) {
                head = make_other(i);
            } else {
                head = make_padding_fill(i);
            }
            team_.write(words, place, head);
        }
        MLA_SHORT_LOOP
        for (int i = team_.rank(); i < p_.num_workers; i += team_.size()) {
            words[(int64_t{noops} + items + i) * kInstructionWords + kWordOpcode] =
                static_cast<int32_t>(Opcode::kEndOfQueue);
        }
    }

    MLA_HOST_DEVICE int first_slot(int sequence) const {
        return static_cast<int>(s_.sums[p_.num_sequences() + sequence]) - counts_.partials;
    }
    // Slots are uids; the others count on behind them.
    MLA_HOST_DEVICE int uid_of(int item) const { return counts_.slots + item; }

    MLA_HOST_DEVICE InstructionHead noop(int place) const {
        return {{static_cast<int32_t>(Opcode::kNoop), uid_of(counts_.items + place)}};
    }

    MLA_HOST_DEVICE InstructionHead make_partial(const Cut& cut, int item, int sequence) const {
        const Partial made = partial(cut, item, sequence);
        const auto pieces = static_cast<int32_t>(s_.pieces[sequence]);
        const bool is_shared = pieces > 1 && cut.has_mates();
        const bool to_slot = pieces > 1 && !is_shared;
        const int index = item - static_cast<int>(s_.sums[sequence]);
        return PartialInstruction{to_slot ? first_slot(sequence) + index : uid_of(item),
                                  sequence,
                                  to_slot,
                                  made.tiles.begin,
                                  made.tiles.end,
                                  s_.length[sequence],
                                  made.group,
                                  s_.rows[sequence],
                                  is_shared ? pieces : 0,
                                  is_shared ? made.piece : 0}
            .head(p_);
    }

    // A reduction, or a fill of an empty sequence.
    MLA_HOST_DEVICE InstructionHead make_other(int item) const {
        const uint32_t* sums = s_.sums + 2 * p_.num_sequences();
        const int number = item + counts_.slots;
        const int sequence = find(sums, number);
        if (s_.length[sequence] == 0) {
            return FillInstruction{
                uid_of(item), requests_.first_token(sequence), requests_.end_token(sequence)}
                .head();
        }
        return ReductionInstruction{uid_of(item),
                                    sequence,
                                    first_slot(sequence),
                                    static_cast<int32_t>(s_.pieces[sequence]),
                                    static_cast<int32_t>(s_.shape[sequence].groups()),
                                    s_.rows[sequence],
                                    number - static_cast<int>(sums[sequence]),
                                    Slices::unpack(s_.slices[sequence])}
            .head(p_);
    }

    MLA_HOST_DEVICE InstructionHead make_padding_fill(int item) const {
        const int number = item - counts_.of_sequences;
        const int per_head = device_plan::larger(1, requests_.padding_fills());
        const int head = number / per_head;
        const int first =
            requests_.padding_begin() + (number - head * per_head) * device_plan::kFillTokens;
        const int end = device_plan::smaller(first + device_plan::kFillTokens, p_.total_tokens);
        return FillInstruction{
            uid_of(item), head * p_.total_tokens + first, head * p_.total_tokens + end}
            .head();
    }

    const Team& team_;
    const DevicePlanProblem& p_;
    const DevicePlanState& s_;
    const DevicePlanRequests requests_;
    Counts counts_{};
};

}  // namespace mla
