// How a partial's loader brings half tiles of KV into pages, by the size of the
// cache's blocks.
#pragma once

#include "instructions/fragments.cuh"
#include "instructions/partial_work.cuh"

namespace mla {

// Block ids of the request, of its first position on.
__device__ inline const int32_t* block_ids_of(const MlaGlobals& g, const PartialWork& work) {
    const int request = g.request_of(work.sequence);
    if (g.kv_indptr != nullptr) [[unlikely]]
        return g.block_ids + __ldg(&g.kv_indptr[request]);
    return g.block_ids + static_cast<int64_t>(request) * g.table_stride;
}

// Where a box of keys lies in the cache.
struct BoxPlace {
    int kv_head, row, block;
};

// Brings the left half of a box to L2, by one warp. (With the right half as well it is in the way
// of the copies that follow: short batches are 3% slower on an H200.)
__device__ inline void bring_to_l2(const MlaGlobals& g, const BoxPlace& box) {
    if (!mk::ptx::elect_lane()) return;
    mk::ptx::tensor_prefetch_5d(
        g.kv_latent, 0, 0, box.kv_head * g.kv_head_step, box.row >> kGroupRowsLog2, box.block);
    mk::ptx::tensor_prefetch_4d(g.kv_rope, 0, box.row, box.kv_head, box.block);
}

// By the copy engine, in one box a tile or in four. (Two, for blocks of 32, are slower than four.)
template <int kBoxes>
class BoxLoader {
  public:
    __device__ BoxLoader(const MlaGlobals& g, const PartialWork& work, int lane)
        : g_(g),
          ids_(block_ids_of(g, work)),
          kv_head_(g.kv_head_of(work.sequence)),
          start_(work.start),
          end_(work.end),
          lane_(lane),
          row_of_box_(row_of(0)),
          first_id_(place_of_id(0)),
          id_(__ldcg(first_id_)) {}

    // The first window's ids have been read while the kernels before still ran, so that keys can be
    // asked for as soon as these have ended. Now they are read again, which is looked at when keys
    // are on their way.
    __device__ void wait_for_earlier_kernels() {
        mk::ptx::wait_for_earlier_kernels(first_id_);
        id_now_ = __ldcg(first_id_);
    }
    // Whether what has been asked for is what should have been; it is from now on.
    __device__ bool were_right() {
        const bool same = id_ == id_now_;
        id_ = id_now_;
        return __all_sync(~0u, same);
    }

    // Windows follow each other: what the one after that of box `first` needs.
    __device__ void look_ahead(int first) {
        next_id_ = __ldg(place_of_id(first + mk::kWarpThreads));
    }

    __device__ void begin_tile(int tile) {
        const int first = tile * kBoxes;
        if (first > 0 && first % mk::kWarpThreads == 0) open_window(first);
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
            block_[box] = __shfl_sync(~0u, id_, first % mk::kWarpThreads + box);
            row_[box] = __shfl_sync(~0u, row_of_box_, first % mk::kWarpThreads + box);
        }
    }

    // Of the tile that has begun, its first box.
    __device__ BoxPlace place() const { return {kv_head_, row_[0], block_[0]}; }

    // One lane waits and asks.
    template <class State, class Tile, class Begin>
    __device__ void load(const State& state, const Tile& tile, Begin begin) const {
        if (!mk::ptx::elect_lane()) return;
        if (tile.index == 0) begin();
        // A box that begins past the end is left out, and what it would hold never used.
        const int positions = end_ - start_ - tile.index * kKvTile;
        const int num_boxes = kBoxes == 1 ? 1 : min(kBoxes, (positions + kRows - 1) / kRows);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto half = tile.half(g_, state, i);
            if (!half.wait_place(state)) return;
            mk::ptx::mbar_arrive_expect_tx(half.full, num_boxes * kRows * kHalfRowBytes);
#pragma unroll
            for (int box = 0; box < kBoxes; ++box) {
                if (box < num_boxes) load_box(half.which, half.page, half.full, box);
            }
        }
    }

  private:
    static constexpr int kRows = kKvTile / kBoxes;

    __device__ void load_box(int half, uint32_t page, uint32_t full, int box) const {
        mk::ptx::tensor_load_5d(latent_address(page) + box * (kRows / kGroupRows) * kKvGroupBytes,
                                g_.kv_latent,
                                full,
                                0,
                                0,
                                kv_head_ * g_.kv_head_step + half * kHalfBlocks,
                                row_[box] >> kGroupRowsLog2,
                                block_[box],
                                g_.kv_policy);
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
    // In its block.
    __device__ int row_of(int first) const {
        const int at = position(first), row = g_.place_in_block(at);
        const bool is_last = end_ - at <= kKvTile;
        return kBoxes == 1 && is_last ? row - TailRows<true>(end_ - start_).first : row;
    }
    // Entries past the request's last block are never read: they may hold anything.
    __device__ const int32_t* place_of_id(int first) const {
        return &ids_[g_.block_of(min(position(first), end_ - 1))];
    }
    __device__ void open_window(int first) {
        id_ = next_id_;
        row_of_box_ = row_of(first);
        look_ahead(first);
    }

    const MlaGlobals& g_;
    const int32_t* ids_;
    int kv_head_, start_, end_, lane_;
    int row_of_box_;  // of the lane's box; may be negative
    const int32_t* first_id_;
    int id_, id_now_, next_id_;        // of the lane's box
    int block_[kBoxes], row_[kBoxes];  // of the tile's boxes
};

// Row by row, 16 bytes a lane, for blocks that no box fits. Lane l looks up rows l and l + 32 of a
// tile, a tile ahead.
class RowLoader {
  public:
    __device__ RowLoader(const MlaGlobals& g, const PartialWork& work, int lane)
        : g_(g),
          ids_(block_ids_of(g, work)),
          end_(work.end),
          lane_(lane),
          position_(work.start + lane),
          chunk_(lane % kLanesPerRow) {
        mk::ptx::wait_for_earlier_kernels(ids_);
        const int kv_head = g.kv_head_of(work.sequence);
        latent_ = g.latent + kv_head * g.latent_strides.head + chunk_ * 16;
        rope_ = g.rope + kv_head * g.rope_strides.head + chunk_ * 16;
        look_up();
    }

    // It has waited: nothing is asked for by ids that are not known yet.
    __device__ void wait_for_earlier_kernels() const {}
    __device__ bool were_right() const { return true; }
    __device__ void look_ahead(int) const {}

    __device__ void begin_tile(int) {
#pragma unroll
        for (int i = 0; i < kRowsPerLane; ++i) {
            // A block outside the cache is not read.
            const int64_t id = next_id_[i];
            exists_[i] = 0 <= id && id < g_.num_blocks;
            const int64_t in_block = g_.place_in_block(position(i));
            latent_of_[i] = id * g_.latent_strides.block + in_block * g_.latent_strides.token;
            rope_of_[i] = id * g_.rope_strides.block + in_block * g_.rope_strides.token;
        }
        position_ += kKvTile;
        look_up();
    }

    // Four rows at a time, eight lanes a row: 128 bytes of each swizzle block, then the first four
    // lanes of each row its rope.
    template <class State, class Tile, class Begin>
    __device__ void load(const State& state, const Tile& tile, Begin begin) const {
        if (tile.index == 0 && mk::ptx::elect_lane()) begin();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto half = tile.half(g_, state, i);
            if (!half.is_own) continue;
            const bool is_free = half.wait_place(state);
            if (!__all_sync(~0u, is_free)) return;
            load_half(half.which, half.page, half.full);
        }
    }

  private:
    static constexpr int kRowsPerLane = kKvTile / mk::kWarpThreads;
    static constexpr int kLanesPerRow = kBlockRowBytes / 16;
    static constexpr int kRowsAtOnce = mk::kWarpThreads / kLanesPerRow;
    static constexpr int kRopeChunks = kRopeRowBytes / 16;

    __device__ void load_half(int half, uint32_t page, uint32_t full) const {
        const char* latent = latent_ + half * kHalfLatent * kElementBytes;
        const char* rope = rope_ + half * kRopeRowBytes;
#pragma unroll
        for (int i = 0; i < kRowsPerLane; ++i) {
#pragma unroll 2
            for (int from = 0; from < mk::kWarpThreads; from += kRowsAtOnce) {
                const int lane = from + lane_ / kLanesPerRow;  // that has looked the row up
                const int row = i * mk::kWarpThreads + lane;
                const bool exists = __shfl_sync(~0u, exists_[i], lane);
                const char* src = latent + __shfl_sync(~0u, latent_of_[i], lane);
                const uint32_t dst = latent_address(page) + row / kGroupRows * kKvGroupBytes +
                                     row % kGroupRows * kBlockRowBytes +
                                     (chunk_ ^ row % kGroupRows) * 16;
#pragma unroll
                for (int block = 0; block < kHalfBlocks; ++block) {
                    mk::ptx::copy_16_bytes_if(
                        exists, dst + block * kGroupBytes, src + block * kBlockRowBytes);
                }
                mk::ptx::copy_16_bytes_if(exists && chunk_ < kRopeChunks,
                                          rope_address(page) + row * kRopeRowBytes +
                                              (chunk_ ^ row / 2 % kRopeChunks) * 16,
                                          rope + __shfl_sync(~0u, rope_of_[i], lane));
            }
        }
        mk::ptx::arrive_when_copied(full);
    }

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
    const char* latent_;  // the KV head's first row, at the lane's chunk
    const char* rope_;
    int end_, lane_;
    int position_;  // of the lane's first row, in the tile to come
    int chunk_;     // 16 bytes of a swizzle block's row that the lane copies
    // Of the lane's rows: bytes from the first row on.
    int64_t latent_of_[kRowsPerLane], rope_of_[kRowsPerLane];
    bool exists_[kRowsPerLane];
    int next_id_[kRowsPerLane];
};

}  // namespace mla
