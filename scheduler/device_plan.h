// Planning of one step by one CTA, from lengths that live on the GPU: no search and no simulation,
// but the same kinds of cuts as the host planner's, chosen by closed formulas. The code is written
// for a team of threads; on the host the team is one thread, and makes the same queue, word for
// word. (Integers only: nanoseconds, tiles, rows.)
//
//   read_lengths   tiles, rows and row groups of every sequence; bad lengths are clamped, counted
//   choose         even pieces of one length; or one line of all sequences, cut where a worker's
//                  share of it is full
//   cut            pieces, [begin, end) tiles of a sequence for all of its row groups
//   count, time    instructions of every sequence, and when each could start
//   write          in that order: partials, reductions over runs of slots, fills; then end marks
#pragma once

#include <cstddef>
#include <cstdint>

#include "instructions/layout.h"
#include "scheduler/device_plan_problem.h"

namespace mla {

// What the team shares, in memory of device_plan_bytes() bytes.
struct DevicePlanState {
    // Of every sequence.
    int32_t* tiles;
    int32_t* rows;
    int32_t* num_pieces;
    uint32_t* end_time;  // of its last piece
    int64_t* line;       // prefix sums of the costs, one more than sequences
    int64_t* counts;     // prefix sums of Counts, one more than sequences
    int64_t* partials;   // prefix sums of their numbers, one more than sequences
    // Of every worker: where the line is cut.
    int32_t* cut_sequence;
    int32_t* cut_tile;
    int32_t* cut_piece;
    // Of every piece, and of every instruction.
    int32_t* piece_begin;
    uint32_t* piece_start;
    uint32_t* start;
    struct Choice* choice;
};

// Times of the order are uint32_t in units of 64 ns.
struct Choice {
    int64_t line_candidate_ns;
    int64_t candidate_ns[device_plan::kCandidates];
    int64_t group_tiles;   // tiles times row groups
    int64_t split_weight;  // rows times pieces of the sequences that are split
    int32_t max_groups, min_groups;
    int32_t longest;  // sequence, in tiles
    int32_t num_bad, bad_request, bad_length;
    int32_t piece_tiles_64;  // chosen length of even pieces, in 1/64 tile; 0: the line
};

// Pieces, slots and instructions before a sequence, in one word.
struct Counts {
    int32_t pieces, slots, items;
    static constexpr int kBits = 21;
    MLA_HOST_DEVICE int64_t pack() const {
        return int64_t{pieces} | int64_t{slots} << kBits | int64_t{items} << 2 * kBits;
    }
    MLA_HOST_DEVICE static Counts unpack(int64_t packed) {
        constexpr int64_t kMask = (int64_t{1} << kBits) - 1;
        return {static_cast<int32_t>(packed & kMask),
                static_cast<int32_t>(packed >> kBits & kMask),
                static_cast<int32_t>(packed >> 2 * kBits & kMask)};
    }
};

// Carves the state out of one block of memory; `memory` may be null to ask for its size.
MLA_HOST_DEVICE size_t device_plan_layout(const DevicePlanProblem& p,
                                          const DevicePlanCapacity& capacity,
                                          unsigned char* memory,
                                          DevicePlanState* state) {
    size_t used = 0;
    const auto take = [&](auto*& pointer, int64_t count) {
        using T = std::remove_reference_t<decltype(*pointer)>;
        used = (used + 15) / 16 * 16;
        pointer = reinterpret_cast<T*>(memory + used);
        used += static_cast<size_t>(count) * sizeof(T);
    };
    DevicePlanState s;
    const int64_t n = p.num_sequences();
    take(s.choice, 1);
    take(s.tiles, n);
    take(s.rows, n);
    take(s.num_pieces, n);
    take(s.end_time, n);
    take(s.line, n + 1);
    take(s.counts, n + 1);
    take(s.partials, n + 1);
    take(s.cut_sequence, p.num_workers + 1);
    take(s.cut_tile, p.num_workers + 1);
    take(s.cut_piece, p.num_workers + 1);
    take(s.piece_begin, capacity.pieces);
    take(s.piece_start, capacity.pieces);
    take(s.start, capacity.instructions + 4);
    if (state != nullptr) *state = s;
    return used;
}

// Rows of 32 words that a plan's tensor needs: the instructions, and the planner's state if shared
// memory cannot hold it.
inline int64_t device_plan_rows(const DevicePlanProblem& p) {
    const DevicePlanCapacity capacity = device_plan_capacity(p);
    const auto bytes = static_cast<int64_t>(device_plan_layout(p, capacity, nullptr, nullptr));
    constexpr int64_t kRowBytes = kInstructionWords * sizeof(int32_t);
    if (bytes <= kDevicePlanSmemBytes) return capacity.instructions;
    return capacity.instructions + device_plan::ceil_div(bytes, kRowBytes);
}

// Team: rank() of size() threads, in groups: lane() of lanes(), group() of num_groups();
// sync(); sum(x), max(x) over the group's lanes; atomic_add, atomic_min, atomic_max;
// prefix_sums(values, n): exclusive, in place, the total behind.
template <class Team>
class DevicePlanner {
  public:
    MLA_HOST_DEVICE DevicePlanner(const Team& team,
                                  const DevicePlanProblem& problem,
                                  const DevicePlanState& state)
        : team_(team), p_(problem), s_(state), choice_(*state.choice) {}

    // Writes instructions and end marks; header: see DevicePlanHeader.
    MLA_HOST_DEVICE void run(int32_t* words, int32_t* header) {
        read_lengths();
        choose();
        cut();
        count();
        time_pieces();
        time_items();
        write(words);
        if (team_.rank() == 0) {
            header[kHeaderInstructions] = num_items();
            header[kHeaderSlots] = totals().slots;
            header[kHeaderBadLengths] = choice_.num_bad;
            header[kHeaderBadRequest] = choice_.bad_request;
            header[kHeaderBadLength] = choice_.bad_length;
        }
    }

  private:
    // ---- sequences ------------------------------------------------------------------

    MLA_HOST_DEVICE int tokens_of(int sequence) const {
        if (p_.cu_seqlens_q == nullptr) return p_.s_q;
        const int request = sequence % p_.num_requests;
        const int tokens = p_.cu_seqlens_q[request + 1] - p_.cu_seqlens_q[request];
        return device_plan::clamp(tokens, 0, p_.s_q);
    }
    MLA_HOST_DEVICE int first_token(int sequence) const {
        if (p_.cu_seqlens_q == nullptr) return sequence * p_.s_q;
        const int first = p_.cu_seqlens_q[sequence % p_.num_requests];
        return sequence / p_.num_requests * p_.total_tokens + first;
    }
    MLA_HOST_DEVICE int length_of(int sequence) const {
        return device_plan::clamp(p_.seq_lens[sequence % p_.num_requests], 0, p_.max_seq_len);
    }
    MLA_HOST_DEVICE int groups(int sequence) const {
        return device_plan::ceil_div(s_.rows[sequence], kMaxRows);
    }
    MLA_HOST_DEVICE bool has_work(int sequence) const {
        return s_.tiles[sequence] > 0 && s_.rows[sequence] > 0;
    }
    MLA_HOST_DEVICE bool is_split(int sequence) const { return s_.num_pieces[sequence] > 1; }
    MLA_HOST_DEVICE bool uniform() const { return choice_.max_groups == choice_.min_groups; }
    // Workers that run the row groups of a piece side by side.
    MLA_HOST_DEVICE int num_gangs() const {
        return device_plan::larger(1, p_.num_workers / choice_.max_groups);
    }
    MLA_HOST_DEVICE int sharing() const { return uniform() ? choice_.max_groups : 1; }
    MLA_HOST_DEVICE int64_t tile_ns(int64_t streams) const {
        const DevicePlanCost& c = p_.cost;
        return device_plan::larger(c.tile_compute + c.tile_contention * (streams - 1) / 1000,
                                   c.tile * streams / sharing() / 1000);
    }

    MLA_HOST_DEVICE void read_lengths() {
        if (team_.rank() == 0) {
            choice_ = {};
            choice_.min_groups = INT32_MAX;
        }
        team_.sync();
        for (int i = team_.rank(); i < p_.num_sequences(); i += team_.size()) {
            const int length = length_of(i);
            const int stated = p_.seq_lens[i % p_.num_requests];
            if (i < p_.num_requests && stated != length &&
                team_.atomic_add(&choice_.num_bad, 1) == 0) {
                choice_.bad_request = i;
                choice_.bad_length = stated;
            }
            s_.rows[i] = tokens_of(i) * p_.num_heads;
            s_.tiles[i] = device_plan::ceil_div(length, kKvTile);
            if (!has_work(i)) continue;
            team_.atomic_max(&choice_.max_groups, groups(i));
            team_.atomic_min(&choice_.min_groups, groups(i));
            team_.atomic_max(&choice_.longest, s_.tiles[i]);
            team_.atomic_add(&choice_.group_tiles, int64_t{s_.tiles[i]} * groups(i));
        }
        team_.sync();
        if (team_.rank() == 0 && choice_.max_groups == 0) {  // nothing to attend to
            choice_.max_groups = choice_.min_groups = 1;
        }
        team_.sync();
    }

    // ---- the choice -----------------------------------------------------------------

    MLA_HOST_DEVICE int num_even_pieces(int sequence, int64_t piece_tiles_64) const {
        return static_cast<int>(
            device_plan::ceil_div(int64_t{s_.tiles[sequence]} * 64, piece_tiles_64));
    }

    // The shortest pieces that could fill every worker once, then longer and longer ones; the last
    // candidate cuts nothing.
    MLA_HOST_DEVICE int64_t candidate_tiles_64(int candidate) const {
        const int64_t longest = int64_t{choice_.longest} * 64;
        const int64_t shortest =
            device_plan::ceil_div(choice_.group_tiles * 64, int64_t{p_.num_workers});
        constexpr int kFine = device_plan::kCandidates / 2;
        if (candidate == device_plan::kCandidates - 1)
            return device_plan::larger(longest, int64_t{64});
        int64_t tiles = shortest * (1000 + 16 * device_plan::smaller(candidate, kFine)) / 1000;
        for (int i = kFine; i < candidate; ++i) tiles = tiles * 6 / 5;
        return device_plan::clamp(tiles, int64_t{64}, device_plan::larger(longest, int64_t{64}));
    }

    // What comes after the last tile of a batch of which some sequences are split.
    MLA_HOST_DEVICE int64_t merge_ns(int64_t weight) const {
        const DevicePlanCost& c = p_.cost;
        const int64_t kib = 2 * device_plan::ceil_div(weight, int64_t{p_.num_workers});
        return c.dependency + c.reduction_fixed + c.reduction_kib * kib / 1000;
    }

    MLA_HOST_DEVICE int64_t even_ns(int64_t piece_tiles_64) const {
        const DevicePlanCost& c = p_.cost;
        int64_t partials = 0, weight = 0, tiles = 0;
        int longest = 0, shortest = INT32_MAX;
        for (int i = team_.lane(); i < p_.num_sequences(); i += team_.lanes()) {
            if (!has_work(i)) continue;
            const int pieces = num_even_pieces(i, piece_tiles_64);
            partials += int64_t{pieces} * groups(i);
            tiles += int64_t{s_.tiles[i]} * groups(i);
            longest = device_plan::larger(longest, device_plan::ceil_div(s_.tiles[i], pieces));
            shortest = device_plan::smaller(shortest, s_.tiles[i] / pieces);
            if (pieces > 1) weight += int64_t{pieces} * s_.rows[i];
        }
        partials = team_.sum(partials);
        tiles = team_.sum(tiles);
        weight = team_.sum(weight);
        longest = team_.max(longest);
        shortest = -team_.max(-shortest);
        if (partials > 2 * int64_t{p_.num_workers} && weight > 0) return kNever;  // slots
        const int64_t store = c.store_kib * 2 * device_plan::smaller(kMaxRows, s_.rows[0]) / 1000;
        const int64_t tail = store + (weight > 0 ? merge_ns(weight) : 0);
        const int64_t wide = device_plan::smaller(partials, int64_t{p_.num_workers});
        const int64_t one = longest * tile_ns(wide);
        if (partials <= p_.num_workers) return c.launch + c.partial_fixed + one + tail;
        // More than one after the other: on average, the last one begins half a piece late; and
        // some worker has as many as waves.
        const int64_t share =
            (partials * c.partial_next + tiles * tile_ns(wide)) / p_.num_workers + one / 2;
        const int64_t waves = device_plan::ceil_div(partials, int64_t{p_.num_workers}) *
                              (c.partial_next + shortest * tile_ns(wide));
        return c.launch + c.partial_fixed +
               device_plan::larger(device_plan::larger(one, share), waves) + tail;
    }

    MLA_HOST_DEVICE int64_t line_cost(int sequence) const {
        if (!has_work(sequence)) return 0;
        return p_.cost.partial_next + s_.tiles[sequence] * tile_ns(p_.num_workers);
    }

    MLA_HOST_DEVICE int64_t line_ns() const {
        const DevicePlanCost& c = p_.cost;
        const int64_t share = s_.line[p_.num_sequences()] / num_gangs() + c.partial_next;
        const int64_t rows = device_plan::smaller(kMaxRows, s_.rows[0]) * choice_.max_groups;
        return c.launch + c.partial_fixed + share + merge_ns(2 * rows * num_gangs()) +
               c.store_kib * 2 * device_plan::smaller(kMaxRows, s_.rows[0]) / 1000;
    }

    MLA_HOST_DEVICE void choose() {
        if (p_.split_tiles > 0) {
            if (team_.rank() == 0) choice_.piece_tiles_64 = p_.split_tiles * 64;
            team_.sync();
            return;
        }
        for (int i = team_.rank(); i < p_.num_sequences(); i += team_.size()) {
            s_.line[i] = line_cost(i);
        }
        for (int i = team_.group(); i < device_plan::kCandidates; i += team_.num_groups()) {
            const int64_t ns = even_ns(candidate_tiles_64(i));
            if (team_.lane() == 0) choice_.candidate_ns[i] = ns;
        }
        team_.sync();
        team_.prefix_sums(s_.line, p_.num_sequences());
        if (team_.rank() == 0) {
            int64_t best_ns = uniform() ? line_ns() : kNever;
            for (int i = device_plan::kCandidates - 1; i >= 0; --i) {
                if (choice_.candidate_ns[i] > best_ns) continue;
                best_ns = choice_.candidate_ns[i];
                choice_.piece_tiles_64 = static_cast<int32_t>(candidate_tiles_64(i));
            }
        }
        team_.sync();
    }

    MLA_HOST_DEVICE bool cuts_line() const { return choice_.piece_tiles_64 == 0; }

    // ---- pieces ---------------------------------------------------------------------

    MLA_HOST_DEVICE void cut() {
        for (int i = team_.rank(); i < p_.num_sequences(); i += team_.size()) {
            s_.end_time[i] = 0;
            if (!has_work(i)) {
                s_.num_pieces[i] = 0;
            } else {
                s_.num_pieces[i] = cuts_line() ? 1 : num_even_pieces(i, choice_.piece_tiles_64);
            }
        }
        team_.sync();
        if (!cuts_line()) return;
        for (int w = team_.rank(); w <= num_gangs(); w += team_.size()) find_cut(w);
        team_.sync();
        for (int w = team_.rank(); w < num_gangs(); w += team_.size()) {
            if (is_new_cut(w)) team_.atomic_add(&s_.num_pieces[s_.cut_sequence[w]], 1);
        }
        team_.sync();
    }

    // Cut w is where worker w's share of the line begins, moved to a whole tile, and to the end of
    // a sequence where too small a piece would be left.
    MLA_HOST_DEVICE void find_cut(int w) {
        const int sequences = p_.num_sequences();
        const int64_t at = s_.line[sequences] * w / num_gangs();
        const int sequence = w == num_gangs() ? sequences : find(s_.line, sequences, at);
        int tile = 0;
        if (sequence < sequences) {
            const int64_t tile_time = tile_ns(p_.num_workers);
            const int64_t inside = at - s_.line[sequence] - p_.cost.partial_next + tile_time / 2;
            const int tiles = s_.tiles[sequence];
            tile = inside <= 0
                       ? 0
                       : static_cast<int>(device_plan::smaller(inside / tile_time, int64_t{tiles}));
            if (tile < device_plan::kMinTiles) tile = 0;
            if (tile > tiles - device_plan::kMinTiles && tile > 0) tile = tiles;
            s_.cut_tile[w] = tile < tiles ? tile : 0;
            s_.cut_sequence[w] = tile < tiles ? sequence : sequence + 1;
        } else {
            s_.cut_tile[w] = 0;
            s_.cut_sequence[w] = sequences;
        }
    }
    // Whether cut w divides a sequence where no cut before it does.
    MLA_HOST_DEVICE bool is_new_cut(int w) const {
        return s_.cut_tile[w] > 0 && (w == 0 || s_.cut_sequence[w - 1] != s_.cut_sequence[w] ||
                                      s_.cut_tile[w - 1] != s_.cut_tile[w]);
    }

    // Largest i with prefix[i] <= at, among those with a cost of their own if possible.
    template <class T>
    MLA_HOST_DEVICE static int find(const T* prefix, int n, T at) {
        int low = 0, high = n;  // prefix[low] <= at < prefix[high], if anywhere
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (prefix[middle] <= at ? low : high) = middle;
        }
        return low;
    }

    // ---- counting -------------------------------------------------------------------

    // Rows and columns of a sequence's reductions: in all about one for each worker.
    struct Slices {
        int rows, cols;
        MLA_HOST_DEVICE int per_group(int group_rows) const {
            return device_plan::ceil_div(group_rows, rows) * (kLatentDim / cols);
        }
    };
    MLA_HOST_DEVICE Slices slices_of(int sequence) const {
        const int rows = device_plan::smaller(kMaxRows, s_.rows[sequence]);
        if (p_.split_tiles > 0) return {device_plan::kInvariantRows, kLatentDim};
        const int64_t weight = int64_t{s_.num_pieces[sequence]} * s_.rows[sequence];
        const int64_t wanted = p_.num_workers * weight / choice_.split_weight / groups(sequence);
        int by_rows = 1, by_cols = 1;
        while (by_rows < rows && 2 * by_rows <= wanted) by_rows *= 2;
        while (by_cols < kLatentDim / kColumnChunk && 2 * by_rows * by_cols <= wanted) by_cols *= 2;
        return {device_plan::ceil_div(rows, by_rows), kLatentDim / by_cols};
    }
    MLA_HOST_DEVICE int rows_of_group(int sequence, int group) const {
        return device_plan::smaller(kMaxRows, s_.rows[sequence] - group * kMaxRows);
    }
    MLA_HOST_DEVICE int num_reductions(int sequence) const {
        if (!is_split(sequence)) return 0;
        const Slices slices = slices_of(sequence);
        const int last = groups(sequence) - 1;
        return last * slices.per_group(kMaxRows) + slices.per_group(rows_of_group(sequence, last));
    }

    // Empty sequences are filled several at a time; the first of them says for how many.
    MLA_HOST_DEVICE bool needs_fill(int sequence) const {
        return s_.rows[sequence] > 0 && s_.tiles[sequence] == 0;
    }
    MLA_HOST_DEVICE bool begins_fill(int sequence) const {
        const int request = sequence % p_.num_requests;
        return needs_fill(sequence) &&
               (request % device_plan::kFillSequences == 0 || !needs_fill(sequence - 1));
    }
    MLA_HOST_DEVICE int end_of_fill(int sequence) const {
        int end = sequence;
        do {
            ++end;
        } while (end < p_.num_sequences() &&
                 end % p_.num_requests % device_plan::kFillSequences != 0 && needs_fill(end));
        return end;
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

    MLA_HOST_DEVICE Counts totals() const { return Counts::unpack(s_.counts[p_.num_sequences()]); }
    MLA_HOST_DEVICE int num_items() const {
        return totals().items + p_.num_kv_heads * padding_fills();
    }

    MLA_HOST_DEVICE void count() {
        for (int i = team_.rank(); i < p_.num_sequences(); i += team_.size()) {
            if (is_split(i)) {
                team_.atomic_add(&choice_.split_weight, int64_t{s_.num_pieces[i]} * s_.rows[i]);
            }
        }
        team_.sync();
        for (int i = team_.rank(); i < p_.num_sequences(); i += team_.size()) {
            const int partials = s_.num_pieces[i] * groups(i);
            const Counts counts{s_.num_pieces[i],
                                is_split(i) ? partials : 0,
                                partials + num_reductions(i) + (begins_fill(i) ? 1 : 0)};
            s_.counts[i] = counts.pack();
            s_.partials[i] = partials;
        }
        team_.sync();
        team_.prefix_sums(s_.counts, p_.num_sequences());
        if (p_.split_tiles > 0) team_.prefix_sums(s_.partials, p_.num_sequences());
    }

    // ---- times ----------------------------------------------------------------------

    static constexpr int64_t kNever = INT64_MAX;
    static constexpr uint32_t kAfterPartials = 1u << 30;
    MLA_HOST_DEVICE static uint32_t time_of(int64_t ns) {
        return static_cast<uint32_t>(device_plan::smaller(ns >> 6, int64_t{kAfterPartials - 1}));
    }

    MLA_HOST_DEVICE int piece_end(int sequence, int piece) const {
        const Counts before = Counts::unpack(s_.counts[sequence]);
        return piece + 1 < s_.num_pieces[sequence] ? s_.piece_begin[before.pieces + piece + 1]
                                                   : s_.tiles[sequence];
    }
    MLA_HOST_DEVICE int sequence_of_piece(int piece) const {
        int low = 0, high = p_.num_sequences();
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (Counts::unpack(s_.counts[middle]).pieces <= piece ? low : high) = middle;
        }
        return low;
    }

    MLA_HOST_DEVICE void time_pieces() {
        const int pieces = totals().pieces;
        for (int i = team_.rank(); i < pieces; i += team_.size()) {
            const int sequence = sequence_of_piece(i);
            const int piece = i - Counts::unpack(s_.counts[sequence]).pieces;
            if (cuts_line() && piece > 0) continue;
            s_.piece_begin[i] = even_begin(sequence, piece);
            // Long ones first.
            const int length = even_begin(sequence, piece + 1) - s_.piece_begin[i];
            s_.piece_start[i] = time_of(int64_t{choice_.longest - length} << 6);
        }
        if (cuts_line()) {
            for (int w = team_.rank(); w <= num_gangs(); w += team_.size()) place_cut(w);
            team_.sync();
            for (int w = team_.rank(); w < num_gangs(); w += team_.size()) time_share(w);
        }
        team_.sync();
    }
    // First tile of a piece when a sequence is cut evenly, or every split_tiles tiles.
    MLA_HOST_DEVICE int even_begin(int sequence, int piece) const {
        const int tiles = s_.tiles[sequence];
        if (p_.split_tiles > 0) return device_plan::smaller(piece * p_.split_tiles, tiles);
        return static_cast<int>(int64_t{tiles} * piece / s_.num_pieces[sequence]);
    }

    MLA_HOST_DEVICE void place_cut(int w) {
        const int sequence = s_.cut_sequence[w];
        int piece = 0;
        for (int v = w; v >= 0 && s_.cut_sequence[v] == sequence; --v) piece += is_new_cut(v);
        const int at = (sequence < p_.num_sequences() ? Counts::unpack(s_.counts[sequence]).pieces
                                                      : totals().pieces) +
                       piece;
        s_.cut_piece[w] = at;
        if (is_new_cut(w)) s_.piece_begin[at] = s_.cut_tile[w];
    }

    // A worker runs pieces that somebody waits for before whole sequences.
    MLA_HOST_DEVICE void time_share(int w) {
        int64_t now_ns = 0;
        for (const bool split : {true, false}) {
            int sequence = s_.cut_sequence[w];
            for (int i = s_.cut_piece[w]; i < s_.cut_piece[w + 1]; ++i) {
                while (Counts::unpack(s_.counts[sequence + 1]).pieces <= i) ++sequence;
                if (is_split(sequence) != split) continue;
                const int piece = i - Counts::unpack(s_.counts[sequence]).pieces;
                const int tiles = piece_end(sequence, piece) - s_.piece_begin[i];
                s_.piece_start[i] = time_of(now_ns);
                now_ns += p_.cost.partial_next + tiles * tile_ns(p_.num_workers);
                if (split) team_.atomic_max(&s_.end_time[sequence], time_of(now_ns));
            }
        }
    }

    // An instruction by its number: those of a sequence are its partials, piece by piece and row
    // group by row group, then its reductions, then its fill; the fills of padding come last.
    struct Item {
        enum Kind { kPartial, kReduction, kFill, kPadding } kind;
        int sequence;
        int index;  // among those of its kind in the sequence
    };
    MLA_HOST_DEVICE Item item_of(int number) const {
        const int in_sequences = totals().items;
        if (number >= in_sequences) return {Item::kPadding, 0, number - in_sequences};
        int low = 0, high = p_.num_sequences();
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (Counts::unpack(s_.counts[middle]).items <= number ? low : high) = middle;
        }
        const int index = number - Counts::unpack(s_.counts[low]).items;
        const int partials = s_.num_pieces[low] * groups(low);
        if (index < partials) return {Item::kPartial, low, index};
        if (is_split(low)) return {Item::kReduction, low, index - partials};
        return {Item::kFill, low, 0};
    }

    MLA_HOST_DEVICE void time_items() {
        if (p_.split_tiles > 0) return;
        const int items = num_items();
        for (int i = team_.rank(); i < device_plan::ceil_div(items, 4) * 4; i += team_.size()) {
            uint32_t start = UINT32_MAX;
            if (i < items) {
                const Item item = item_of(i);
                start = kAfterPartials;
                if (item.kind == Item::kPartial) {
                    const int first = Counts::unpack(s_.counts[item.sequence]).pieces;
                    start = s_.piece_start[first + item.index / groups(item.sequence)];
                } else if (item.kind == Item::kReduction && cuts_line()) {
                    start = s_.end_time[item.sequence] + time_of(p_.cost.dependency) + 1;
                } else if (item.kind == Item::kReduction) {
                    start = kAfterPartials + 1;
                }
            }
            s_.start[i] = start;
        }
        team_.sync();
    }

    // How many instructions come before this one. Equal times keep the order of the numbers. With
    // pieces of a fixed length, of which there may be many, all partials come first.
    MLA_HOST_DEVICE int position_of(int number) const {
        if (p_.split_tiles > 0) {
            const int sequences = p_.num_sequences();
            const auto all = static_cast<int>(s_.partials[sequences]);
            const Item item = item_of(number);
            if (item.kind == Item::kPadding) return number;
            const auto before = static_cast<int>(s_.partials[item.sequence]);
            if (item.kind == Item::kPartial) return before + item.index;
            return all + number - static_cast<int>(s_.partials[item.sequence + 1]);
        }
        const uint32_t own = s_.start[number];
        int before = 0;
        const int items = num_items();
        for (int i = 0; i < items; i += 4) {
            const Quad quad = *reinterpret_cast<const Quad*>(s_.start + i);
            before += quad.a < own || (quad.a == own && i < number);
            before += quad.b < own || (quad.b == own && i + 1 < number);
            before += quad.c < own || (quad.c == own && i + 2 < number);
            before += quad.d < own || (quad.d == own && i + 3 < number);
        }
        return before;
    }
    struct alignas(16) Quad {
        uint32_t a, b, c, d;
    };

    // ---- words ----------------------------------------------------------------------

    MLA_HOST_DEVICE void write(int32_t* words) const {
        const int items = num_items();
        for (int i = team_.rank(); i < items; i += team_.size()) {
            Instruction instruction;
            make(i, instruction);
            reinterpret_cast<Instruction*>(words)[position_of(i)] = instruction;
        }
        for (int i = team_.rank(); i < p_.num_workers; i += team_.size()) {
            words[(int64_t{items} + i) * kInstructionWords + kWordOpcode] =
                static_cast<int32_t>(Opcode::kEndOfQueue);
        }
    }

    struct alignas(16) Instruction {
        int32_t words[kInstructionWords] = {};
    };

    MLA_HOST_DEVICE void make(int number, Instruction& to) const {
        const Item item = item_of(number);
        // Slots are uids; the others count on behind them.
        to.words[kWordUid] = totals().slots + number;
        if (item.kind == Item::kPartial) {
            make_partial(item, to.words);
        } else if (item.kind == Item::kReduction) {
            make_reduction(item, to.words);
        } else {
            make_fill(item, to.words);
        }
    }

    MLA_HOST_DEVICE void make_partial(const Item& item, int32_t* words) const {
        const int sequence = item.sequence;
        const Counts before = Counts::unpack(s_.counts[sequence]);
        const int piece = item.index / groups(sequence), group = item.index % groups(sequence);
        const int length = length_of(sequence);
        words[kWordOpcode] = static_cast<int32_t>(Opcode::kMlaPartial);
        words[PartialWords::kDstBatch] = sequence;
        if (is_split(sequence)) {
            const int slot = before.slots + item.index;
            words[kWordUid] = slot;
            words[PartialWords::kDstBatch] = -slot - 1;
        }
        words[PartialWords::kQBatch] = sequence;
        words[PartialWords::kStart] = s_.piece_begin[before.pieces + piece] * kKvTile;
        words[PartialWords::kEnd] = static_cast<int32_t>(
            device_plan::smaller(int64_t{piece_end(sequence, piece)} * kKvTile, int64_t{length}));
        words[PartialWords::kLength] = length;
        words[PartialWords::kRowBegin] = group * kMaxRows;
        words[PartialWords::kNumRows] = rows_of_group(sequence, group);
    }

    MLA_HOST_DEVICE void make_reduction(const Item& item, int32_t* words) const {
        const int sequence = item.sequence;
        const Counts before = Counts::unpack(s_.counts[sequence]);
        const Slices slices = slices_of(sequence);
        const int per_full_group = slices.per_group(kMaxRows);
        const int group = device_plan::smaller(item.index / per_full_group, groups(sequence) - 1);
        const int slice = item.index - group * per_full_group;
        const int columns = kLatentDim / slices.cols;
        const int row = slice / columns * slices.rows;
        const ReductionShape shape{
            1,
            0,
            device_plan::smaller(slices.rows, rows_of_group(sequence, group) - row),
            slice % columns * slices.cols,
            slices.cols,
            true};
        words[kWordOpcode] = static_cast<int32_t>(Opcode::kMlaReduction);
        words[ReductionWords::kShape] = shape.pack();
        words[ReductionWords::kDstBatch] = sequence;
        words[ReductionWords::kRunFirst] = before.slots + group;
        words[ReductionWords::kRunCount] = s_.num_pieces[sequence];
        words[ReductionWords::kRunStep] = groups(sequence);
        words[ReductionWords::kRunRowOffset] = group * kMaxRows + row;
    }

    MLA_HOST_DEVICE void make_fill(const Item& item, int32_t* words) const {
        int begin, end;
        if (item.kind == Item::kFill) {
            const int last = end_of_fill(item.sequence) - 1;
            begin = first_token(item.sequence);
            end = first_token(last) + tokens_of(last);
        } else {
            const int head = item.index / padding_fills(), part = item.index % padding_fills();
            const int first = padding_begin() + part * device_plan::kFillTokens;
            begin = head * p_.total_tokens + first;
            end = head * p_.total_tokens +
                  device_plan::smaller(first + device_plan::kFillTokens, p_.total_tokens);
        }
        words[kWordOpcode] = static_cast<int32_t>(Opcode::kMlaFill);
        words[FillWords::kTokenBegin] = begin;
        words[FillWords::kTokenEnd] = end;
    }

    const Team& team_;
    const DevicePlanProblem& p_;
    const DevicePlanState& s_;
    Choice& choice_;
};

}  // namespace mla
