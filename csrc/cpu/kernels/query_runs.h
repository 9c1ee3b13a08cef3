// The main loop of every pass that finishes queries: a job is a run of query tiles that share a key head; it loops over
// blocks of keys, packs each block once for all its tiles, and keeps their sums in its scratch.
#pragma once

#include "cpu/kernels/tile_parts.h"

namespace attention_ext {
namespace {

// Tiles of a job: the packed block serves that many, and their operands and sums stay in L2 beside it.
constexpr int64_t kTilesPerJob = 8;
constexpr int64_t kRunBytes = 256 << 10;
constexpr int64_t kEnoughJobs = 16;  // with fewer, jobs shrink so that threads share the work

template <class C>
struct RunShape {
  using T = typename C::Scalar;
  int64_t depth, columns;  // elements of head_dim, numbers of head_dim_v in whole vectors
  int64_t keys;            // rows of a block
  int64_t tiles_per_job, jobs_per_group, jobs;

  // numbers_per_query: the numbers that a job holds per query
  RunShape(const AttentionProblem& p, int64_t numbers_per_query, int64_t most_tiles = kTilesPerJob) {
    depth = ceil_div(p.head_dim, C::kPair);
    columns = round_up(p.head_dim_v, kLanes<T>);
    keys = minimum(kKeys, round_up(p.max_seqlen_k, kTileRows));
    const int64_t tiles = ceil_div(p.max_seqlen_q, kQueries<T>) * p.group_size();
    const int64_t tile_bytes = kQueries<T> * numbers_per_query * static_cast<int64_t>(sizeof(T));
    const int64_t fair = ceil_div(tiles * p.batch * p.kv_heads, kEnoughJobs);
    tiles_per_job = clamp(minimum(kRunBytes / tile_bytes, fair), 1, most_tiles);
    jobs_per_group = ceil_div(tiles, tiles_per_job);
    jobs = p.batch * p.kv_heads * jobs_per_group;
  }

  int64_t batch_of(const AttentionProblem& p, int64_t job) const { return job / jobs_per_group / p.kv_heads; }
};

// Job provides prologue(i), pack_keys(k), tile_block(i, tile, lane, k) for the part of tile i that begins at `lane`
// and some of the packed keys, and epilogue(i).
template <class C, class Job>
class QueryRun {
  using T = typename C::Scalar;

 protected:
  QueryRun(const AttentionProblem& problem, const RunShape<C>& shape, Tile* tiles)
      : shape_(shape), tiles_(tiles), problem_(problem) {}

  void mainloop(int64_t job) {
    const int64_t run = shape_.jobs_per_group - 1 - job % shape_.jobs_per_group;  // the longest of a causal call first
    mainloop(shape_.batch_of(problem_, job), job / shape_.jobs_per_group % problem_.kv_heads, run);
  }

  void mainloop(int64_t batch, int64_t kv_head, int64_t run) {
    kv_head_ = kv_head;
    sequence_ = sequence_of(problem_, batch);
    make_tiles(run);
    for_each_block(
        [this](Range k) { self().pack_keys(k); },
        [this](int64_t i, const Tile& tile, int64_t lane, Range keys) { self().tile_block(i, tile, lane, keys); });
    for (int64_t i = 0; i < count_; ++i) self().epilogue(i);
  }

  // pack(k) for every block of keys that a tile sees, and part(i, tile, lane, keys) for the keys that each tile sees.
  template <class Pack, class Part>
  void for_each_block(Pack&& pack, Part&& part) {
    const int64_t first = visible_.begin - visible_.begin % C::kPair;  // pairs of packed rows stay pairs
    for (int64_t k = first / kKeys * kKeys; k < visible_.end; k += kKeys) {
      packed_kv_ = shown({maximum(k, first), minimum(k + kKeys, visible_.end)});
      if (packed_kv_.empty()) continue;
      pair_padding_ = maximum<int64_t>(visible_.begin - packed_kv_.begin, 0);
      pack(packed_kv_);
      for (int64_t i = 0; i < count_; ++i) {
        for_each_part<C>(problem_, tiles_[i], packed_kv_,
                         [&](const Tile& tile, int64_t lane, Range keys) { part(i, tile, lane, keys); });
      }
    }
  }

  Job& self() { return static_cast<Job&>(*this); }

  RunShape<C> shape_;
  Sequence sequence_{};
  int64_t kv_head_ = 0;
  Tile* tiles_;
  Range visible_{};           // keys that any tile sees
  Range packed_kv_{};         // of them, the packed block
  int64_t pair_padding_ = 0;  // rows before the first visible key that only complete a pair

 private:
  // Of k, what lies between the first and the last key in blocks that the sparse mask shows to a tile.
  Range shown(Range k) const {
    if (!problem_.sparse_mask) return k;
    Range all{k.end, k.begin};
    for (int64_t i = 0; i < count_; ++i) {
      const Tile& tile = tiles_[i];
      const Range keys = problem_.sparse_mask.hull(sequence_.batch, {tile.head, tile.head + 1}, tile.q, k);
      if (!keys.empty()) all = {minimum(all.begin, keys.begin), maximum(all.end, keys.end)};
    }
    return all;
  }

  // Heads of a group run innermost, so that the tiles of a job see nearly the same keys.
  void make_tiles(int64_t run) {
    const int64_t tiles = ceil_div(sequence_.length_q, kQueries<T>) * problem_.group_size();
    const int64_t first = run * shape_.tiles_per_job;
    count_ = clamp(tiles - first, 0, shape_.tiles_per_job);
    visible_ = {INT64_MAX, 0};
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t head = kv_head_ * problem_.group_size() + (first + i) % problem_.group_size();
      tiles_[i] = tile_of<T>(sequence_, head, (first + i) / problem_.group_size());
      const Range keys = visible_keys(problem_, sequence_, tiles_[i].q);
      if (!keys.empty()) visible_ = {minimum(visible_.begin, keys.begin), maximum(visible_.end, keys.end)};
      self().prologue(i);
    }
  }

  const AttentionProblem& problem_;
  int64_t count_ = 0;
};

}  // namespace
}  // namespace attention_ext
