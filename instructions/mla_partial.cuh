// MLA partial: attention of up to 64 (token, head) rows of one request over a
// range of its KV positions, in tiles of 64.
//
//     loader     Q once, then KV tiles into two stages, each as a left and a right half page
//     consumers  two warpgroups. Scores and softmax: the left one does even tiles, the right one
//                odd tiles. Output: the left one accumulates latent columns 0-255 of all tiles,
//                the right one columns 256-511. So the softmax of one tile runs under the matrix
//                products of its neighbour, and O fits in registers.
//     storer     raises the flag of the scratch slot that the consumers have written
//
// Scores are kept in base 2: p = 2^(s * scale_log2 - m), with m the running maximum of s in the
// same units. The warpgroups hand each other P (bf16) and m through shared memory.
#pragma once

#include "instructions/epilogue.cuh"
#include "megakernel/opcode_list.cuh"
#include "megakernel/state.cuh"

namespace mla {

template <class Config>
struct MlaPartial {
    static constexpr int kOpcode = static_cast<int>(Opcode::kMlaPartial);
    static constexpr mk::Role kPrefetchGate = mk::Role::kLoader;
    using State = mk::State<Config>;
    using Element = typename Config::Element;
    using Words = PartialWords;

    static_assert(sizeof(HalfTile) == Config::kSmemPageBytes && Config::kNumSmemPages == 6,
                  "Q and two KV tiles, two pages each");
    static constexpr int kStages = 2;

    // Logical pages, in the order of the loads.
    static constexpr int q_page(int half) { return half; }
    static constexpr int kv_page(int stage, int half) { return 2 + 2 * stage + half; }

    enum Semaphore {
        kQFull = 0,
        kKvFull,                 // + 2 * stage + half
        kKvEmpty = kKvFull + 4,  // + 2 * stage + half
        kOutputStored = kKvEmpty + 4,
        kCount,
    };
    static constexpr int kNumSemaphores = kCount;
    static constexpr int kWarpsPerWarpgroup = 4;

    // The words, decoded.
    struct Work {
        int dst_batch, sequence, start, end, length, num_tiles;
        TokenSpan tokens;
        int first_row, num_rows;  // of the sequence

        __device__ Work(const MlaGlobals& g, const State& state) {
            dst_batch = state.word(Words::kDstBatch);
            sequence = state.word(Words::kQBatch);
            start = state.word(Words::kStart);
            end = state.word(Words::kEnd);
            length = state.word(Words::kLength);
            tokens = g.tokens_of(sequence);
            first_row = first_row_of(g, state.words());
            num_rows = num_rows_of(g, state.words());
            num_tiles = num_tiles_of(state.words());
        }
        // KV positions that a row of the group may see: [0, visible).
        __device__ int visible(const MlaGlobals& g, int row) const {
            if (!g.causal || tokens.count == 1) return min(end, length);
            return min(end, length - tokens.count + (first_row + row) / g.num_heads + 1);
        }
        // The row as q and the output count it.
        __device__ int flat_row(const MlaGlobals& g, int row) const {
            return tokens.first * g.num_heads + first_row + row;
        }
    };

    __device__ static int num_tiles_of(const int32_t* words) {
        return (words[Words::kEnd] - words[Words::kStart] + kKvTile - 1) / kKvTile;
    }
    __device__ static int first_row_of(const MlaGlobals& g, const int32_t* words) {
        return words[Words::kQSeq] * g.num_heads + words[Words::kRowBegin];
    }
    __device__ static int num_rows_of(const MlaGlobals& g, const int32_t* words) {
        const int stated = words[Words::kNumRows];
        if (stated > 0) [[likely]]
            return stated;
        return min(kMaxRows, g.num_rows_of(words[Words::kQBatch]) - first_row_of(g, words));
    }
    struct Controller {
        __device__ static int arrival_count(const MlaGlobals& g, int semaphore) {
            if (semaphore == kOutputStored) return Config::kNumConsumerWarps;
            if (semaphore >= kKvEmpty) return kWarpsPerWarpgroup;
            const bool copied_by_lanes = semaphore >= kKvFull && g.kv_box_rows == 0;
            return copied_by_lanes ? mk::kWarpThreads : 1;
        }
        // The stage that the last tile leaves idle comes first, Q's pages last.
        __device__ static int released_page(const MlaGlobals&, const int32_t* words, int k) {
            const bool stage_1_first = num_tiles_of(words) % 2 == 1;
            const int half = k % 2;
            if (k >= 4) return q_page(half);
            return kv_page((k / 2) ^ static_cast<int>(stage_1_first), half);
        }
    };

    struct Loader {
        __device__ static void run(const MlaGlobals& g, State& state) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            const Work work(g, state);
            if (lane == 0) state.record(mk::TimingWord::kLoadBegin);
            if constexpr (Config::kWholeTileBoxes) {
                load<BoxLoader<1>>(g, state, work, lane);
            } else if (g.kv_box_rows == 32) {
                load<BoxLoader<2>>(g, state, work, lane);
            } else if (g.kv_box_rows == 16) {
                load<BoxLoader<4>>(g, state, work, lane);
            } else {
                load<RowLoader>(g, state, work, lane);
            }
            if (work.num_tiles == 1) state.pass_pages_from(kv_page(1, 0), lane);
            if (lane == 0) state.record(mk::TimingWord::kLoadEnd);
        }

      private:
        template <class KvLoader>
        __device__ static void load(const MlaGlobals& g, State& state, const Work& work, int lane) {
            KvLoader kv(g, work, lane);
            load_q(g, state, work, lane);
            for (int tile = 0; tile < work.num_tiles; ++tile) {
                kv.begin_tile(tile);
                const int stage = tile % kStages;
                for (int half = 0; half < 2; ++half) {
                    const bool ok = tile < kStages ? state.wait_page(kv_page(stage, half))
                                                   : state.wait(kKvEmpty + 2 * stage + half,
                                                                tile / kStages - 1);
                    const uint32_t full = state.semaphore(kKvFull + 2 * stage + half);
                    const uint32_t page = mk::ptx::smem_address(state.page(kv_page(stage, half)));
                    if (ok) kv.load_half(tile, half, page, full);
                }
                __syncwarp();
            }
        }

        __device__ static void load_q(const MlaGlobals& g,
                                      State& state,
                                      const Work& work,
                                      int lane) {
            const uint32_t full = state.semaphore(kQFull);
            state.wait_page(q_page(kLeft));
            state.wait_page(q_page(kRight));
            if (lane != 0) return;
            // The last box may hold rows of another sequence; nobody looks at what becomes of them.
            for (int row = 0; row < work.num_rows; row += g.q_box_rows) {
                mk::ptx::mbar_expect_tx(full, g.q_box_rows * 2 * kHalfRowBytes);
            }
            mk::ptx::mbar_arrive(full);
            for (int row = 0; row < work.num_rows; row += g.q_box_rows) {
                const int from = work.flat_row(g, row);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t page = mk::ptx::smem_address(state.page(q_page(half)));
#pragma unroll
                    for (int block = 0; block < kHalfBlocks; ++block) {
                        mk::ptx::tensor_load_2d(
                            latent_address(page) + (block * kMaxRows + row) * kBlockRowBytes,
                            g.q_latent,
                            full,
                            half * kHalfLatent + block * kBlockCols,
                            from,
                            mk::ptx::kEvictNormal);
                    }
                    mk::ptx::tensor_load_2d(rope_address(page) + row * kRopeRowBytes,
                                            g.q_rope,
                                            full,
                                            half * kHalfRope,
                                            from,
                                            mk::ptx::kEvictNormal);
                }
            }
        }

        // Block ids of the request, of its first position on.
        __device__ static const int32_t* block_ids_of(const MlaGlobals& g, const Work& work) {
            const int request = g.request_of(work.sequence);
            if (g.kv_indptr != nullptr) [[unlikely]]
                return g.block_ids + __ldg(&g.kv_indptr[request]);
            return g.block_ids + static_cast<int64_t>(request) * g.table_stride;
        }

        // By the copy engine, in one, two or four boxes a tile.
        template <int kBoxes>
        class BoxLoader {
          public:
            __device__ BoxLoader(const MlaGlobals& g, const Work& work, int lane)
                : g_(g),
                  ids_(block_ids_of(g, work)),
                  kv_head_(g.kv_head_of(work.sequence)),
                  start_(work.start),
                  end_(work.end),
                  lane_(lane),
                  next_id_(look_up(0)) {
                open_window(0);
            }

            __device__ void begin_tile(int tile) {
                const int first = tile * kBoxes;
                if (first > 0 && first % mk::kWarpThreads == 0) open_window(first);
#pragma unroll
                for (int box = 0; box < kBoxes; ++box) {
                    block_[box] = __shfl_sync(~0u, id_, first % mk::kWarpThreads + box);
                    row_[box] = __shfl_sync(~0u, in_block_, first % mk::kWarpThreads + box);
                }
            }

            __device__ void load_half(int tile, int half, uint32_t page, uint32_t full) const {
                if (lane_ != 0) return;
                // A box that begins past the end is left out, and what it would hold never used.
                const int positions = end_ - start_ - tile * kKvTile;
                const int num_boxes =
                    kBoxes == 1 ? 1 : min(kBoxes, (positions + kRows - 1) / kRows);
                mk::ptx::mbar_arrive_expect_tx(full, num_boxes * kRows * kHalfRowBytes);
#pragma unroll
                for (int box = 0; box < kBoxes; ++box) {
                    if (box < num_boxes) load_box(half, page, full, box);
                }
            }

          private:
            static constexpr int kRows = kKvTile / kBoxes;
            // Only a box as high as the tile can bring all swizzle blocks at once.
            static constexpr int kBlocksPerBox = kBoxes == 1 ? kHalfBlocks : 1;

            __device__ void load_box(int half, uint32_t page, uint32_t full, int box) const {
#pragma unroll
                for (int block = 0; block < kHalfBlocks; block += kBlocksPerBox) {
                    mk::ptx::tensor_load_5d(
                        latent_address(page) + (block * kKvTile + box * kRows) * kBlockRowBytes,
                        g_.kv_latent,
                        full,
                        0,
                        row_[box],
                        half * kHalfBlocks + block,
                        kv_head_,
                        block_[box],
                        g_.kv_policy);
                }
                mk::ptx::tensor_load_4d(rope_address(page) + box * kRows * kRopeRowBytes,
                                        g_.kv_rope,
                                        full,
                                        half * kHalfRope,
                                        row_[box],
                                        kv_head_,
                                        block_[box],
                                        g_.kv_policy);
            }

            // Of the lane's box in the window of 32 that begins with box `first`.
            __device__ int position(int first) const { return start_ + (first + lane_) * kRows; }
            // Entries past the request's last block are never read: they may hold anything.
            __device__ int look_up(int first) const {
                const int at = position(first);
                return at < end_ ? __ldg(&ids_[g_.block_of(at)]) : 0;
            }
            // Windows follow each other; what the next one needs is read ahead.
            __device__ void open_window(int first) {
                id_ = next_id_;
                in_block_ = g_.place_in_block(position(first));
                next_id_ = look_up(first + mk::kWarpThreads);
            }

            const MlaGlobals& g_;
            const int32_t* ids_;
            int kv_head_, start_, end_, lane_;
            int id_, in_block_, next_id_;      // of the lane's box
            int block_[kBoxes], row_[kBoxes];  // of the tile's boxes
        };

        // Row by row, 16 bytes a lane, for blocks that no box fits. Lane l looks up rows l and
        // l + 32 of a tile, a tile ahead.
        class RowLoader {
          public:
            __device__ RowLoader(const MlaGlobals& g, const Work& work, int lane)
                : g_(g),
                  ids_(block_ids_of(g, work)),
                  kv_head_(g.kv_head_of(work.sequence)),
                  end_(work.end),
                  lane_(lane),
                  position_(work.start + lane) {
                look_up();
            }

            __device__ void begin_tile(int) {
#pragma unroll
                for (int i = 0; i < kRowsPerLane; ++i) {
                    // A block outside the cache is not read.
                    const bool exists = 0 <= next_id_[i] && next_id_[i] < g_.num_blocks;
                    id_[i] = exists ? next_id_[i] : -1;
                    row_[i] = g_.place_in_block(position(i));
                }
                position_ += kKvTile;
                look_up();
            }

            // Four rows at a time, eight lanes a row: 128 bytes of each swizzle block, then the
            // first four lanes of each row its rope.
            __device__ void load_half(int, int half, uint32_t page, uint32_t full) const {
                const int row_of_four = lane_ / kLanesPerRow, chunk = lane_ % kLanesPerRow;
                const int64_t column = half * kHalfLatent * kElementBytes + chunk * 16;
                const char* latent = g_.latent + kv_head_ * g_.latent_strides.head + column;
                const char* rope =
                    g_.rope + kv_head_ * g_.rope_strides.head + half * kRopeRowBytes + chunk * 16;
#pragma unroll
                for (int i = 0; i < kRowsPerLane; ++i) {
#pragma unroll 2
                    for (int from = 0; from < mk::kWarpThreads; from += kRowsAtOnce) {
                        const int row = i * mk::kWarpThreads + from + row_of_four;
                        const int64_t id = __shfl_sync(~0u, id_[i], from + row_of_four);
                        const int64_t in_block = __shfl_sync(~0u, row_[i], from + row_of_four);
                        const char* src = latent + id * g_.latent_strides.block +
                                          in_block * g_.latent_strides.token;
                        const uint32_t dst =
                            latent_address(page) + row * kBlockRowBytes + (chunk ^ row % 8) * 16;
#pragma unroll
                        for (int block = 0; block < kHalfBlocks; ++block) {
                            mk::ptx::copy_16_bytes_if(id >= 0,
                                                      dst + block * kKvTile * kBlockRowBytes,
                                                      src + block * kBlockRowBytes);
                        }
                        mk::ptx::copy_16_bytes_if(
                            id >= 0 && chunk < kRopeChunks,
                            rope_address(page) + row * kRopeRowBytes +
                                (chunk ^ row / 2 % kRopeChunks) * 16,
                            rope + id * g_.rope_strides.block + in_block * g_.rope_strides.token);
                    }
                }
                mk::ptx::arrive_when_copied(full);
            }

          private:
            static constexpr int kRowsPerLane = kKvTile / mk::kWarpThreads;
            static constexpr int kLanesPerRow = kBlockRowBytes / 16;
            static constexpr int kRowsAtOnce = mk::kWarpThreads / kLanesPerRow;
            static constexpr int kRopeChunks = kRopeRowBytes / 16;

            __device__ int position(int i) const { return position_ + i * mk::kWarpThreads; }
            __device__ void look_up() {
#pragma unroll
                for (int i = 0; i < kRowsPerLane; ++i) {
                    const int at = position(i);
                    next_id_[i] = at < end_ ? __ldg(&ids_[g_.block_of(at)]) : -1;
                }
            }

            const MlaGlobals& g_;
            const int32_t* ids_;
            int kv_head_, end_, lane_;
            int position_;  // of the lane's first row, in the tile to come
            // Of the lane's rows; id -1: no such row.
            int id_[kRowsPerLane], row_[kRowsPerLane], next_id_[kRowsPerLane];
        };
    };

    struct Consumer {
        // The epilogue stands once, for both warpgroups: it is long straight code that runs once
        // per instruction, and code that comes from L2 takes ten cycles an instruction (H200).
        __device__ static void run(const MlaGlobals& g, State& state) {
            Accumulator o;
            RowState rows;
            kittens::zero(o);
            const int half = threadIdx.x / kWarpgroupThreads;
            if (half == kLeft) {
                Warpgroup<kLeft>(g, state, o, rows).attend();
            } else {
                Warpgroup<kRight>(g, state, o, rows).attend();
            }
            // Each warpgroup has summed the tiles that it scored itself.
            Scratch& shared = scratch(state);
            rows.publish_sum(shared.row_sum[half]);
            barrier_sync(NamedBarrier::kConsumersSynced, kConsumerThreads);
            rows.add_sum(shared.row_sum[half ^ 1]);

            // Both have done with Q: its pages hold the output now, then the next instruction's Q.
            store_output(g, state, half, o, rows);
            mk::ptx::fence_proxy_async_smem();
            __syncwarp();
            const bool first_lane = mk::ptx::thread_in_cta() % mk::kWarpThreads == 0;
            if (first_lane) state.release_page(q_page(half), 1);
            if (half == kLeft) store_lse(g, state, rows);
            if (mk::ptx::thread_in_cta() == 0) state.record(mk::TimingWord::kComputeEnd);
            __syncwarp();
            if (first_lane) state.arrive(kOutputStored);
        }

      private:
        // What the warpgroups hand each other, in the consumers' scratch.
        struct Scratch {
            PTile<Element> p;
            float even_max[kMaxRows];
            float odd_max[kMaxRows];
            float row_sum[2][kMaxRows];
            int visible[kMaxRows];  // positions from the start on
        };
        static_assert(sizeof(Scratch) <= Config::kScratchBytes);

        __device__ static Scratch& scratch(const State& state) {
            return *reinterpret_cast<Scratch*>(state.scratch());
        }
        __device__ static uint32_t page_address(const State& state, int logical) {
            return mk::ptx::smem_address(state.page(logical));
        }

        __device__ static void store_output(const MlaGlobals& g,
                                            const State& state,
                                            int half,
                                            const Accumulator& o,
                                            const RowState& rows) {
            const Work work(g, state);
            // Warps without a row of the group have nothing to store.
            if (fragment_row() / 16 * 16 >= work.num_rows) return;
            const uint32_t page = page_address(state, q_page(half));
            float sink_log2[2] = {-INFINITY, -INFINITY};
            if (writes_scratch(work.dst_batch)) {
                const int slot = scratch_slot(work.dst_batch);
                float* dst = g.o_scratch + g.scratch_row(slot, 0) * kLatentDim;
                store_rows(
                    o, rows.inverse_sum(sink_log2), page, dst + half * kHalfLatent, work.num_rows);
                return;
            }
            if (g.attn_sink != nullptr) {
                for (int i = 0; i < 2; ++i) {
                    const int row = min(fragment_row() + 8 * i, work.num_rows - 1);
                    const int flat = work.flat_row(g, row);
                    sink_log2[i] = g.sink_log2(flat / g.num_heads, flat % g.num_heads);
                }
            }
            Element* dst = reinterpret_cast<Element*>(g.out) +
                           static_cast<int64_t>(work.flat_row(g, 0)) * kLatentDim;
            store_rows(
                o, rows.inverse_sum(sink_log2), page, dst + half * kHalfLatent, work.num_rows);
        }

        __device__ static void store_lse(const MlaGlobals& g,
                                         const State& state,
                                         const RowState& rows) {
            if (mk::ptx::thread_in_cta() % 4 != 0) return;
            const Work work(g, state);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = fragment_row() + 8 * i;
                if (row >= work.num_rows) continue;
                const float lse_log2 = rows.lse_log2(i);
                if (writes_scratch(work.dst_batch)) {
                    const int slot = scratch_slot(work.dst_batch);
                    g.lse_log2_scratch[g.scratch_row(slot, row)] = lse_log2;
                } else {
                    const int flat = work.flat_row(g, row);
                    g.store_lse(flat / g.num_heads, flat % g.num_heads, lse_log2);
                }
            }
        }

        template <Half kHalf>
        struct Warpgroup {
            const MlaGlobals& g;
            State& state;
            Accumulator& o;
            RowState& rows;
            // Registers are what this code is short of: words are read again where they are
            // needed, and these two numbers are all that the loop asks for.
            int num_tiles;
            int plain_tiles;  // leading tiles that every row sees in full

            __device__ Warpgroup(const MlaGlobals& g, State& state, Accumulator& o, RowState& rows)
                : g(g), state(state), o(o), rows(rows) {
                const Work work(g, state);
                num_tiles = work.num_tiles;
                plain_tiles = max(0, work.visible(g, 0) - work.start) / kKvTile;
                // Each warp writes what its own lanes will read.
                if (mk::ptx::thread_in_cta() % 4 == 0) {
                    for (const int row : {fragment_row(), fragment_row() + 8}) {
                        scratch().visible[row] = work.visible(g, row) - work.start;
                    }
                }
                __syncwarp();
            }

            __device__ void attend() {
                state.wait(kQFull, 0);
                if (threadIdx.x == 0) state.record(mk::TimingWord::kComputeBegin);
                const int num_pairs = (num_tiles + 1) / 2;
                for (int pair = 0; pair < num_pairs; ++pair) {
                    const bool has_odd = 2 * pair + 1 < num_tiles;
                    if constexpr (kHalf == kLeft) {
                        left_pair(pair, has_odd);
                    } else {
                        has_odd ? right_pair(pair) : right_single(2 * pair);
                    }
                }
            }

            // ---- one pair of tiles ------------------------------------------------------
            //
            // The tensor cores' order, and what runs beside it:
            //     scores of the even tile
            //     scores of the odd tile      | softmax of the even one, left
            //     even P V, left and right    | softmax of the odd one, right
            //     odd P V, left and right
            // A warpgroup's products queue up in order; between the two the barriers decide.

            __device__ void left_pair(int pair, bool has_odd) {
                const int even = 2 * pair, odd = even + 1;
                Scores s;
                PFragment<Element> p;
                send_scores(s, even);
                kittens::warpgroup::mma_async_wait();
                barrier_arrive(NamedBarrier::kEvenScored, kConsumerThreads);
                mask(s, even);
                const RowScale moved = rows.template absorb<Element>(s, p, g.scale_log2);
                // The last odd tile's P has been read: these scores came after it in the queue.
                publish(p, scratch().even_max);
                barrier_arrive(NamedBarrier::kEvenPReady, kConsumerThreads);

                clear_past_length(even);
                moved.apply(o);
                if (has_odd) barrier_sync(NamedBarrier::kOddScored, kConsumerThreads);
                accumulate<Element>(o, p, half_page(even));
                kittens::warpgroup::mma_async_wait();
                release(even);
                if (!has_odd) return;

                wait_kv(odd, kLeft);
                clear_past_length(odd);
                barrier_sync(NamedBarrier::kOddPReady, kConsumerThreads);
                rows.follow(scratch().odd_max).apply(o);
                accumulate<Element>(o, scratch().p, half_page(odd));
                kittens::warpgroup::mma_async_wait();
                release(odd);
            }

            __device__ void right_pair(int pair) {
                const int even = 2 * pair, odd = even + 1;
                Scores s;
                PFragment<Element> p;
                barrier_sync(NamedBarrier::kEvenScored, kConsumerThreads);
                send_scores(s, odd);
                RowScale followed = follow_even(even);
                kittens::warpgroup::mma_async_wait();
                followed.pin();
                barrier_arrive(NamedBarrier::kOddScored, kConsumerThreads);
                followed.apply(o);
                accumulate<Element>(o, scratch().p, half_page(even));

                mask(s, odd);
                const RowScale moved = rows.template absorb<Element>(s, p, g.scale_log2);
                clear_past_length(odd);
                kittens::warpgroup::mma_async_wait();
                warpgroup_sync<kRight>();  // all four warps have read the even tile's P
                publish(p, scratch().odd_max);
                barrier_arrive(NamedBarrier::kOddPReady, kConsumerThreads);
                release(even);
                moved.apply(o);
                accumulate<Element>(o, p, half_page(odd));
                kittens::warpgroup::mma_async_wait();
                release(odd);
            }

            // The last tile of an odd number.
            __device__ void right_single(int tile) {
                barrier_sync(NamedBarrier::kEvenScored, kConsumerThreads);
                follow_even(tile).apply(o);
                accumulate<Element>(o, scratch().p, half_page(tile));
                kittens::warpgroup::mma_async_wait();
                release(tile);
            }

            // ---- its steps ----------------------------------------------------------------

            __device__ Scratch& scratch() const { return Consumer::scratch(state); }
            // Shared-memory addresses.
            __device__ uint32_t page(int logical) const { return page_address(state, logical); }
            __device__ uint32_t half_page(int tile) const {
                return page(kv_page(tile % kStages, kHalf));
            }

            // Right: P of the even tile is there, and so is its half of V.
            __device__ RowScale follow_even(int even) {
                wait_kv(even, kRight);
                clear_past_length(even);
                barrier_sync(NamedBarrier::kEvenPReady, kConsumerThreads);
                return rows.follow(scratch().even_max);
            }

            __device__ void wait_kv(int tile, int half) const {
                state.wait(kKvFull + 2 * (tile % kStages) + half, tile / kStages);
                // What lanes copied came through the generic proxy; the tensor cores read through
                // the other one.
                if (!Config::kWholeTileBoxes && g.kv_box_rows == 0) {
                    mk::ptx::fence_proxy_async_smem();
                }
            }

            // Sends S = Q K^T of one tile to the tensor cores.
            __device__ void send_scores(Scores& s, int tile) {
                const int stage = tile % kStages;
                wait_kv(tile, kLeft);
                multiply_scores<Element, true>(s, page(q_page(kLeft)), page(kv_page(stage, kLeft)));
                wait_kv(tile, kRight);
                multiply_scores<Element, false>(
                    s, page(q_page(kRight)), page(kv_page(stage, kRight)));
                kittens::warpgroup::mma_commit_group();
            }

            // Scores that a row must not see become -inf, whatever was read for them.
            __device__ void mask(Scores& s, int tile) const {
                if (tile < plain_tiles) return;
                const int* visible = scratch().visible + fragment_row();
                hide_past(s, visible[0] - tile * kKvTile, visible[8] - tile * kKvTile);
            }

            // V rows past the request's length meet P = 0, but NaN * 0 is NaN: they become 0.
            // Each warpgroup clears the half that it multiplies.
            __device__ void clear_past_length(int tile) const {
                if (tile < plain_tiles) return;
                const int valid =
                    state.word(Words::kLength) - state.word(Words::kStart) - tile * kKvTile;
                if (valid >= kKvTile) return;
                clear_rows(half_page(tile), valid);
                mk::ptx::fence_proxy_async_smem();
                warpgroup_sync<kHalf>();
            }

            __device__ void publish(const PFragment<Element>& p, float* row_max) const {
                kittens::warpgroup::store(scratch().p, p);
                rows.publish_max(row_max);
                mk::ptx::fence_proxy_async_smem();
            }

            // This warpgroup's half of a tile has been read: the last two tiles' pages go to the
            // next instruction.
            __device__ void release(int tile) const {
                if (mk::ptx::thread_in_cta() % mk::kWarpThreads != 0) return;
                const int stage = tile % kStages;
                if (tile + kStages < num_tiles) {
                    state.arrive(kKvEmpty + 2 * stage + kHalf);
                } else {
                    state.release_page(kv_page(stage, kHalf), 1);
                }
            }
        };
    };

    using Launcher = mk::Idle;

    struct Storer {
        __device__ static void run(const MlaGlobals& g, State& state) {
            if (threadIdx.x % mk::kWarpThreads != 0) return;
            const int dst_batch = state.word(Words::kDstBatch);
            const bool ok = state.wait(kOutputStored, 0);
            state.record(mk::TimingWord::kStoreBegin);
            if (ok && writes_scratch(dst_batch)) {
                state.raise_done_flag(&g.done_flags[scratch_slot(dst_batch)]);
            }
            state.record(mk::TimingWord::kStoreEnd);
        }
    };
};

}  // namespace mla
