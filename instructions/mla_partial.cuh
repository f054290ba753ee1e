// MLA partial: attention of up to 64 (token, head) rows of one request over a
// range of its KV positions, in tiles of 64.
//
//     loader     Q once, then KV tiles into two stages, each as a left and a right half page
//     consumers  two warpgroups. Scores and softmax: the left one does even tiles, the right one
//                odd tiles. Output: the left one accumulates latent columns 0-255 of all tiles,
//                the right one columns 256-511. So the softmax of one tile runs under the matrix
//                products of its neighbour, and O fits in registers.
//     storer     writes the output, or the scratch slot and its flags, out of the pages of Q
//
// Scores are kept in base 2: p = 2^(s * scale_log2 - m), with m the running maximum of s in the
// same units. The warpgroups hand each other P (bf16) and m through shared memory.
#pragma once

#include "instructions/mla_globals.cuh"
#include "instructions/softmax.cuh"
#include "instructions/staging.cuh"
#include "megakernel/opcode_list.cuh"
#include "megakernel/state.cuh"

namespace mla {

template <class Config>
struct MlaPartial {
    static constexpr int kOpcode = static_cast<int>(Opcode::kMlaPartial);
    static constexpr mk::Role kPrefetchGate = mk::Role::kLoader;
    using State = mk::State<Config>;
    using Words = PartialWords;

    static_assert(sizeof(HalfTile) == Config::kSmemPageBytes && Config::kNumSmemPages == 6,
                  "Q and two KV tiles, two pages each");
    static constexpr int kStages = 2;

    // Logical pages, in the order of the loads.
    static constexpr int q_page(int half) { return half; }
    static constexpr int kv_page(int stage, int half) { return 2 + 2 * stage + half; }

    enum Semaphore {
        kQFull = 0,
        kKvFull,                       // + 2 * stage + half
        kKvEmpty = kKvFull + 4,        // + 2 * stage + half
        kOutputStaged = kKvEmpty + 4,  // + half
        kLseStored = kOutputStaged + 2,
        kCount,
    };
    static constexpr int kNumSemaphores = kCount;
    static constexpr int kWarpsPerWarpgroup = 4;

    // The words, decoded.
    struct Work {
        int dst_batch, q_batch, q_seq, start, end, length, row_begin, num_rows, num_tiles;

        __device__ Work(const MlaGlobals& g, const State& state) {
            dst_batch = state.word(Words::kDstBatch);
            q_batch = state.word(Words::kQBatch);
            q_seq = state.word(Words::kQSeq);
            start = state.word(Words::kStart);
            end = state.word(Words::kEnd);
            length = state.word(Words::kLength);
            // Rows counted from the request's first token.
            row_begin = state.word(Words::kRowBegin) + q_seq * g.num_heads;
            const int rows = state.word(Words::kNumRows);
            num_rows = rows > 0 ? rows : g.s_q * g.num_heads - row_begin;
            num_tiles = (end - start + kKvTile - 1) / kKvTile;
        }
        // KV positions that row r may see: [0, visible(r)). Causal, aligned to the end.
        __device__ int visible(const MlaGlobals& g, int row) const {
            return min(end, length - g.s_q + (row_begin + row) / g.num_heads + 1);
        }
    };

    // fp32 rows of 1 KiB per half: more than 32 of them need the pages of stage 0 too.
    __device__ static bool stages_in_kv_pages(const MlaGlobals& g, int dst_batch) {
        return writes_scratch(dst_batch) && g.row_group > 32;
    }

    struct Controller {
        __device__ static int arrival_count(const MlaGlobals&, int semaphore) {
            return semaphore >= kKvEmpty ? kWarpsPerWarpgroup : 1;
        }
        // The stage that the last tile leaves idle comes first, Q's pages (staging) last.
        __device__ static int released_page(const MlaGlobals& g, const int32_t* words, int k) {
            const int tiles = (words[Words::kEnd] - words[Words::kStart] + kKvTile - 1) / kKvTile;
            const bool stage_1_first =
                tiles % 2 == 1 || stages_in_kv_pages(g, words[Words::kDstBatch]);
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
            BlockIds ids(g, work, lane);
            load_q(g, state, work, lane);
            for (int tile = 0; tile < work.num_tiles; ++tile) {
                const int block = ids.of_tile(g, work, tile, lane);
                load_kv(g, state, work, tile, block, lane);
            }
            if (work.num_tiles == 1) state.pass_pages_from(kv_page(1, 0), lane);
            if (lane == 0) state.record(mk::TimingWord::kLoadEnd);
        }

      private:
        // Block ids of the next tiles, one per lane, read a window ahead of their use.
        struct BlockIds {
            int current, next;

            __device__ BlockIds(const MlaGlobals& g, const Work& work, int lane)
                : current(read(g, work, lane)), next(read(g, work, mk::kWarpThreads + lane)) {}

            __device__ int of_tile(const MlaGlobals& g, const Work& work, int tile, int lane) {
                const int place = tile % mk::kWarpThreads;
                if (place == 0 && tile > 0) {
                    current = next;
                    next = read(g, work, tile + mk::kWarpThreads + lane);
                }
                return __shfl_sync(~0u, current, place);
            }

            // Entries past the request's last block are never read: they may hold anything.
            __device__ static int read(const MlaGlobals& g, const Work& work, int tile) {
                if (tile >= work.num_tiles) return 0;
                const int position = work.start + tile * kKvTile;
                return __ldg(&g.block_table[static_cast<int64_t>(work.q_batch) * g.table_stride +
                                            position / g.block_size]);
            }
        };

        __device__ static void load_q(const MlaGlobals& g,
                                      State& state,
                                      const Work& work,
                                      int lane) {
            const uint32_t full = state.semaphore(kQFull);
            state.wait_page(q_page(kLeft));
            state.wait_page(q_page(kRight));
            if (lane != 0) return;
            // Boxes hold row_group rows; rows past the request's last come as zeros, and count.
            mk::ptx::mbar_arrive_expect_tx(full,
                                           g.row_group * (kLatentDim + kRopeDim) * sizeof(bf16));
            for (int half = 0; half < 2; ++half) {
                auto& page = *reinterpret_cast<HalfTile*>(state.page(q_page(half)));
                for (int block = 0; block < kHalfBlocks; ++block) {
                    mk::ptx::tensor_load_3d(mk::ptx::smem_address(&page.latent) +
                                                block * kKvTile * kBlockCols * sizeof(bf16),
                                            g.q_latent,
                                            full,
                                            half * kHalfLatent + block * kBlockCols,
                                            work.row_begin,
                                            work.q_batch,
                                            mk::ptx::kEvictNormal);
                }
                mk::ptx::tensor_load_3d(mk::ptx::smem_address(&page.rope),
                                        g.q_rope,
                                        full,
                                        half * kHalfRope,
                                        work.row_begin,
                                        work.q_batch,
                                        mk::ptx::kEvictNormal);
            }
        }

        __device__ static void load_kv(
            const MlaGlobals& g, State& state, const Work& work, int tile, int block, int lane) {
            const int stage = tile % kStages;
            const int row = (work.start + tile * kKvTile) % g.block_size;
            for (int half = 0; half < 2; ++half) {
                auto& page = *reinterpret_cast<HalfTile*>(state.page(kv_page(stage, half)));
                const bool ok = tile < kStages
                                    ? state.wait_page(kv_page(stage, half))
                                    : state.wait(kKvEmpty + 2 * stage + half, tile / kStages - 1);
                if (lane != 0 || !ok) continue;
                const uint32_t full = state.semaphore(kKvFull + 2 * stage + half);
                mk::ptx::mbar_arrive_expect_tx(full, sizeof(HalfTile));
                mk::ptx::tensor_load_4d(mk::ptx::smem_address(&page.latent),
                                        g.kv_latent,
                                        full,
                                        0,
                                        row,
                                        half * kHalfBlocks,
                                        block,
                                        g.kv_policy);
                mk::ptx::tensor_load_3d(mk::ptx::smem_address(&page.rope),
                                        g.kv_rope,
                                        full,
                                        half * kHalfRope,
                                        row,
                                        block,
                                        g.kv_policy);
            }
            __syncwarp();
        }
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

            stage_output(g, state, half, o, rows);
            mk::ptx::fence_proxy_async_smem();
            if (mk::ptx::thread_in_cta() == 0) state.record(mk::TimingWord::kComputeEnd);
            arrive_per_warp(state, kOutputStaged + half);
            if (half == kLeft) {
                store_lse(g, state, rows);
                arrive_per_warp(state, kLseStored);
            }
        }

      private:
        // What the warpgroups hand each other, in the consumers' scratch.
        struct Scratch {
            PTile p;
            float even_max[kMaxRows];
            float odd_max[kMaxRows];
            float row_sum[2][kMaxRows];
        };
        static_assert(sizeof(Scratch) <= Config::kScratchBytes);

        __device__ static Scratch& scratch(const State& state) {
            return *reinterpret_cast<Scratch*>(state.scratch());
        }
        __device__ static uint32_t page_address(const State& state, int logical) {
            return mk::ptx::smem_address(state.page(logical));
        }

        __device__ static void arrive_per_warp(const State& state, int semaphore) {
            __syncwarp();
            if (mk::ptx::thread_in_cta() % mk::kWarpThreads == 0) state.arrive(semaphore);
        }

        // Swizzle blocks of row_group rows, as the storer's boxes want them.
        __device__ static void stage_output(const MlaGlobals& g,
                                            const State& state,
                                            int half,
                                            const Accumulator& o,
                                            const RowState& rows) {
            // Warps without a row of the group have nothing to stage.
            if (fragment_row() / 16 * 16 >= g.row_group) return;
            const uint32_t first = page_address(state, q_page(half));
            if (writes_scratch(state.word(Words::kDstBatch))) {
                const uint32_t rest = page_address(state, kv_page(0, half));
                stage_fp32(o, rows.inverse_sum(), first, rest, g.row_group);
            } else {
                stage_bf16(o, rows.inverse_sum(), first, g.row_group);
            }
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
                const int flat = work.row_begin + row;
                const float lse_log2 = rows.lse_log2(i);
                if (writes_scratch(work.dst_batch)) {
                    const int slot = scratch_slot(work.dst_batch);
                    g.lse_log2_scratch[g.first_row(slot) + flat] = lse_log2;
                } else {
                    g.store_lse(work.dst_batch, flat / g.num_heads, flat % g.num_heads, lse_log2);
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
                PFragment p;
                send_scores(s, even);
                kittens::warpgroup::mma_async_wait();
                barrier_arrive(NamedBarrier::kEvenScored, kConsumerThreads);
                mask(s, even);
                const RowScale moved = rows.absorb(s, p, g.scale_log2);
                // The last odd tile's P has been read: these scores came after it in the queue.
                publish(p, scratch().even_max);
                barrier_arrive(NamedBarrier::kEvenPReady, kConsumerThreads);

                clear_past_length(even);
                moved.apply(o);
                if (has_odd) barrier_sync(NamedBarrier::kOddScored, kConsumerThreads);
                accumulate(o, p, half_page(even));
                kittens::warpgroup::mma_async_wait();
                release(even);
                if (!has_odd) return;

                wait_kv(odd, kLeft);
                clear_past_length(odd);
                barrier_sync(NamedBarrier::kOddPReady, kConsumerThreads);
                rows.follow(scratch().odd_max).apply(o);
                accumulate(o, mk::ptx::smem_address(&scratch().p), half_page(odd));
                kittens::warpgroup::mma_async_wait();
                release(odd);
            }

            __device__ void right_pair(int pair) {
                const int even = 2 * pair, odd = even + 1;
                Scores s;
                PFragment p;
                barrier_sync(NamedBarrier::kEvenScored, kConsumerThreads);
                send_scores(s, odd);
                RowScale followed = follow_even(even);
                kittens::warpgroup::mma_async_wait();
                followed.pin();
                barrier_arrive(NamedBarrier::kOddScored, kConsumerThreads);
                followed.apply(o);
                accumulate(o, mk::ptx::smem_address(&scratch().p), half_page(even));

                mask(s, odd);
                const RowScale moved = rows.absorb(s, p, g.scale_log2);
                clear_past_length(odd);
                kittens::warpgroup::mma_async_wait();
                warpgroup_sync<kRight>();  // all four warps have read the even tile's P
                publish(p, scratch().odd_max);
                barrier_arrive(NamedBarrier::kOddPReady, kConsumerThreads);
                release(even);
                moved.apply(o);
                accumulate(o, p, half_page(odd));
                kittens::warpgroup::mma_async_wait();
                release(odd);
            }

            // The last tile of an odd number.
            __device__ void right_single(int tile) {
                barrier_sync(NamedBarrier::kEvenScored, kConsumerThreads);
                follow_even(tile).apply(o);
                accumulate(o, mk::ptx::smem_address(&scratch().p), half_page(tile));
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
            }

            // Sends S = Q K^T of one tile to the tensor cores.
            __device__ void send_scores(Scores& s, int tile) {
                const int stage = tile % kStages;
                wait_kv(tile, kLeft);
                multiply_scores<true>(s, page(q_page(kLeft)), page(kv_page(stage, kLeft)));
                wait_kv(tile, kRight);
                multiply_scores<false>(s, page(q_page(kRight)), page(kv_page(stage, kRight)));
                kittens::warpgroup::mma_commit_group();
            }

            // Scores that a row must not see become -inf, whatever was read for them.
            __device__ void mask(Scores& s, int tile) const {
                if (tile < plain_tiles) return;
                const Work work(g, state);
                const int first = work.start + tile * kKvTile;
                const int row = fragment_row();
                hide_past(s, work.visible(g, row) - first, work.visible(g, row + 8) - first);
            }

            // V rows past the request's length meet P = 0, but NaN * 0 is NaN: they become 0.
            // Each warpgroup clears the half that it multiplies.
            __device__ void clear_past_length(int tile) const {
                if (tile < plain_tiles) return;
                const Work work(g, state);
                const int valid = work.length - (work.start + tile * kKvTile);
                if (valid >= kKvTile) return;
                clear_rows(half_page(tile), valid);
                mk::ptx::fence_proxy_async_smem();
                warpgroup_sync<kHalf>();
            }

            __device__ void publish(const PFragment& p, float* row_max) const {
                kittens::warpgroup::store(scratch().p, p);
                rows.publish_max(row_max);
                mk::ptx::fence_proxy_async_smem();
            }

            // This warpgroup's half of a tile has been read: the last two tiles' pages go to the
            // next instruction, unless the output is staged in them.
            __device__ void release(int tile) const {
                if (mk::ptx::thread_in_cta() % mk::kWarpThreads != 0) return;
                const int stage = tile % kStages;
                if (tile + kStages < num_tiles) {
                    state.arrive(kKvEmpty + 2 * stage + kHalf);
                } else if (stage == 1 || !stages_in_kv_pages(g, state.word(Words::kDstBatch))) {
                    state.release_page(kv_page(stage, kHalf), 1);
                }
            }
        };
    };

    using Launcher = mk::Idle;

    struct Storer {
        __device__ static void run(const MlaGlobals& g, State& state) {
            const int lane = threadIdx.x % mk::kWarpThreads;
            const Work work(g, state);
            const bool scratch = writes_scratch(work.dst_batch);
            bool ok = true;
            for (int half = 0; half < 2; ++half) {
                ok = state.wait(kOutputStaged + half, 0) && ok;
                if (lane != 0 || !ok) continue;
                if (half == 0) state.record(mk::TimingWord::kStoreBegin);
                scratch ? store_scratch(g, state, work, half) : store_o(g, state, work, half);
            }
            if (lane == 0) {
                mk::ptx::bulk_commit();
                mk::ptx::bulk_wait_read();
                release_staging(g, state, work);
                ok = state.wait(kLseStored, 0) && ok;
                if (scratch && ok) {
                    mk::ptx::bulk_wait_written();
                    raise_flags(g, state, work);
                }
                state.record(mk::TimingWord::kStoreEnd);
            }
            __syncwarp();
        }

      private:
        __device__ static void store_o(const MlaGlobals& g,
                                       const State& state,
                                       const Work& work,
                                       int half) {
            const uint32_t page = mk::ptx::smem_address(state.page(q_page(half)));
            for (int block = 0; block < kHalfBlocks; ++block) {
                mk::ptx::tensor_store_3d(g.o,
                                         page + block * g.row_group * 128,
                                         half * kHalfLatent + block * kBlockCols,
                                         work.row_begin,
                                         work.dst_batch);
            }
        }

        __device__ static void store_scratch(const MlaGlobals& g,
                                             const State& state,
                                             const Work& work,
                                             int half) {
            const uint32_t first = mk::ptx::smem_address(state.page(q_page(half)));
            const uint32_t rest = mk::ptx::smem_address(state.page(kv_page(0, half)));
            for (int block = 0; block < kFp32Blocks; ++block) {
                mk::ptx::tensor_store_3d(g.o_scratch_map,
                                         fp32_block(block, first, rest, g.row_group),
                                         half * kHalfLatent + block * kFp32BlockCols,
                                         work.row_begin,
                                         scratch_slot(work.dst_batch));
            }
        }

        __device__ static void release_staging(const MlaGlobals& g,
                                               const State& state,
                                               const Work& work) {
            for (int half = 0; half < 2; ++half) {
                state.release_page(q_page(half), Config::kPageReleaseArrivals);
                if (stages_in_kv_pages(g, work.dst_batch)) {
                    state.release_page(kv_page(0, half), Config::kPageReleaseArrivals);
                }
            }
        }

        __device__ static void raise_flags(const MlaGlobals& g,
                                           const State& state,
                                           const Work& work) {
            const int slot = scratch_slot(work.dst_batch);
            const int last = (work.row_begin + work.num_rows - 1) / g.num_heads;
            state.raise_done_flags(g.done_flag(slot, work.row_begin / g.num_heads),
                                   g.done_flag(slot, last));
        }
    };
};

}  // namespace mla
