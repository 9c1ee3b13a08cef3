// out = softmax(scores) value and its logsumexp. A job is a run of query tiles that share a key head; it walks the keys
// in blocks, packs each block once for all its tiles, and keeps their sums in its scratch.
#pragma once

#include "cpu/kernels/dropout.h"
#include "cpu/kernels/softmax.h"

namespace attention_ext {
namespace {

// Tiles of a job: the packed block serves that many, and their sums (at most this many bytes) stay in L2 beside it.
constexpr int64_t kTilesPerJob = 8;
constexpr int64_t kSumBytes = 256 << 10;
constexpr int64_t kEnoughJobs = 16;  // with fewer, jobs shrink so that threads share the work

template <class C>
struct ForwardShape {
  using T = typename C::Scalar;
  int64_t depth, columns;   // elements of head_dim, columns of value rounded up to vectors
  int64_t tiles_per_group;  // of the longest sequence: query tiles times the heads of a group
  int64_t tiles_per_job, jobs_per_group;
  int64_t keys;  // rows of a block

  explicit ForwardShape(const AttentionProblem& p) {
    depth = ceil_div(p.head_dim, C::kPair);
    columns = round_up(p.head_dim_v, kLanes<T>);
    tiles_per_group = ceil_div(p.max_seqlen_q, kQueries<T>) * p.group_size();
    const int64_t tile_bytes = kQueries<T> * (depth + columns) * static_cast<int64_t>(sizeof(T));
    const int64_t fair = ceil_div(tiles_per_group * p.batch * p.kv_heads, kEnoughJobs);
    tiles_per_job = clamp(minimum(kSumBytes / tile_bytes, fair), 1, kTilesPerJob);
    jobs_per_group = ceil_div(tiles_per_group, tiles_per_job);
    keys = minimum(kKeys, round_up(p.max_seqlen_k, kTileRows));
  }
};

template <class C>
struct ForwardScratch {
  using T = typename C::Scalar;
  using Element = typename C::Element;
  Element *query_rows, *query_columns, *key_rows, *value_rows, *value_lanes, *weight;
  T *sums, *score, *bias, *factor;
  RowState<T>* rows;
  Tile* tiles;

  ForwardScratch(Arena& arena, const AttentionProblem& p, const ForwardShape<C>& shape) {
    const int64_t padded_depth = round_up(shape.depth, kLanes<Element>), padded_keys = shape.keys + kTileRows;
    query_rows = arena.take<Element>(kQueries<T> * padded_depth);
    query_columns = arena.take<Element>(shape.tiles_per_job * padded_depth * kQueries<T>);
    key_rows = arena.take<Element>(padded_keys * padded_depth);
    value_rows = arena.take<Element>(padded_keys * shape.columns);
    value_lanes = arena.take<Element>(C::kPair == 1 ? 0 : padded_keys * shape.columns);
    weight = arena.take<Element>(C::kPair == 1 ? 0 : padded_keys * kQueries<T>);
    sums = arena.take<T>(shape.tiles_per_job * kQueries<T> * shape.columns);
    score = arena.take<T>(padded_keys * kQueries<T>);
    bias = arena.take<T>(p.attn_mask ? shape.keys * kQueries<T> : 0);
    factor = arena.take<T>(kQueries<T>);
    rows = arena.take<RowState<T>>(shape.tiles_per_job);
    tiles = arena.take<Tile>(shape.tiles_per_job);
  }
};

template <class C>
class ForwardJob {
  using T = typename C::Scalar;
  using Element = typename C::Element;

 public:
  static void run(const AttentionProblem& problem, void*, void* scratch, int64_t job) {
    const auto& p = static_cast<const ForwardProblem&>(problem);
    Arena arena(scratch);
    ForwardJob(p, arena).walk(job);
  }

 private:
  ForwardJob(const ForwardProblem& p, Arena& arena)
      : p_(p), shape_(p), scratch_(arena, p, shape_), dropout_(dropout_of(p)) {}

  void walk(int64_t job) {
    const int64_t group = job / shape_.jobs_per_group;
    const int64_t run = shape_.jobs_per_group - 1 - job % shape_.jobs_per_group;  // the longest of a causal call first
    kv_head_ = group % p_.kv_heads;
    sequence_ = sequence_of(p_, group / p_.kv_heads);
    open_tiles(run);
    if (count_ == 0) return;
    for (int64_t k = visible_.begin / kKeys * kKeys; k < visible_.end; k += kKeys) {
      block(Range{maximum(k, visible_.begin), minimum(k + kKeys, visible_.end)});
    }
    for (int64_t i = 0; i < count_; ++i) close_tile(i);
  }

  // Heads of a group run innermost, so that the tiles of a job see nearly the same keys.
  void open_tiles(int64_t run) {
    const int64_t tiles = ceil_div(sequence_.length_q, kQueries<T>) * p_.group_size();
    const int64_t first = run * shape_.tiles_per_job;
    count_ = clamp(tiles - first, 0, shape_.tiles_per_job);
    visible_ = {INT64_MAX, 0};
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t head = kv_head_ * p_.group_size() + (first + i) % p_.group_size();
      const Tile tile = tile_of<T>(sequence_, head, (first + i) / p_.group_size());
      scratch_.tiles[i] = tile;
      const Range k = visible_keys(p_, sequence_, tile.q);
      visible_ = {minimum(visible_.begin, k.begin), maximum(visible_.end, k.end)};

      const int64_t queries = tile.vectors * kLanes<T>;
      const Source source = source_of(p_.query, sequence_.tensor_batch, head, sequence_.begin_q + tile.q.begin);
      const auto rows = rows_of<C>(source, tile.q.size(), queries, p_.head_dim, scratch_.query_rows);
      transpose_rows<C>(rows, tile.vectors, shape_.depth, query_columns(i));

      const T sink = p_.sinks ? static_cast<T>(p_.sinks[sequence_.batch * p_.sinks_stride_b + head] * kLog2E)
                              : static_cast<T>(-__builtin_inf());
      for (int64_t lane = 0; lane < queries; lane += kLanes<T>) {
        store(scratch_.rows[i].maximum + lane, splat<T>(sink));
        store(scratch_.rows[i].sum + lane, splat<T>(p_.sinks ? 1 : 0));
      }
      for (int64_t at = 0; at < queries * shape_.columns; at += kLanes<T>) store(sums(i).data + at, Vec<T>{});
    }
    visible_.begin -= visible_.begin % C::kPair;
  }

  void block(Range k) {
    const int64_t padded = round_up(k.size(), kTileRows);
    const int64_t row = sequence_.begin_k + k.begin, b = sequence_.tensor_batch;
    const auto key = rows_of<C>(source_of(p_.key, b, kv_head_, row), k.size(), padded, p_.head_dim, scratch_.key_rows);
    const auto value_rows =
        rows_of<C>(source_of(p_.value, b, kv_head_, row), k.size(), padded, p_.head_dim_v, scratch_.value_rows);
    const auto value = lanes_of<C>(value_rows, padded, shape_.columns, scratch_.value_lanes);
    for (int64_t i = 0; i < count_; ++i) {
      const Range seen = visible_keys(p_, sequence_, scratch_.tiles[i].q);
      const Range part{maximum(k.begin, seen.begin - seen.begin % C::kPair), minimum(k.end, seen.end)};
      if (part.empty()) continue;
      const int64_t skip = part.begin - k.begin;
      tile_block(i, part, {key.row(skip), key.stride}, {value.row(skip / C::kPair), value.stride});
    }
  }

  void tile_block(int64_t i, Range k, Matrix<const Element> key, Matrix<const Element> value) {
    const Tile& tile = scratch_.tiles[i];
    Block<T> block;
    if (!open_block(p_, tile, k, Matrix<T>{scratch_.bias, kQueries<T>}, block)) return;
    const Matrix<T> score{scratch_.score, kQueries<T>};
    multiply<C>(by_rows(key), as_operand(query_columns(i)), shape_.depth, score, round_up(k.size(), 2), tile.vectors,
                Start::kZero);
    with_constants(tile.vectors, block.rules, [&](auto vectors, auto rules) {
      softmax_block<C, vectors, rules>(block, score, scratch_.rows[i], scratch_.factor);
    });
    if (shape_.columns == 0) return;
    if (dropout_.present) drop(p_, dropout_, tile, k, score);
    const Matrix<const Element> weight = weights_by_keys<C>(score, k.size(), tile.vectors, scratch_.weight);
    multiply<C>(by_columns(weight), value, ceil_div(k.size(), C::kPair), sums(i), tile.vectors * kLanes<T>,
                shape_.columns / kLanes<T>, Start::kScaleAndAdd, scratch_.factor);
  }

  void close_tile(int64_t i) {
    const Tile& tile = scratch_.tiles[i];
    const RowState<T>& state = scratch_.rows[i];
    const int64_t q = sequence_.begin_q + tile.q.begin, b = sequence_.tensor_batch;
    T* logsumexp = static_cast<T*>(p_.logsumexp) + (b * p_.heads + tile.head) * p_.seqlen_q + q;
    const T kept_scale = static_cast<T>(dropout_.kept_scale);
    for (int64_t r = 0; r < tile.q.size(); ++r) {
      const T sum = state.sum[r];
      logsumexp[r] = static_cast<T>(kLn2) * (state.maximum[r] + log2_of(sum));
      scratch_.factor[r] = sum == 0 ? T(0) : kept_scale / sum;
    }
    write_rows(source_of(p_.out, b, tile.head, q), tile.q.size(), p_.head_dim_v, as_operand(sums(i)), scratch_.factor);
  }

  Matrix<Element> query_columns(int64_t i) const {
    return {scratch_.query_columns + i * round_up(shape_.depth, kLanes<Element>) * kQueries<T>, kQueries<T>};
  }
  Matrix<T> sums(int64_t i) const { return {scratch_.sums + i * kQueries<T> * shape_.columns, shape_.columns}; }

  const ForwardProblem& p_;
  ForwardShape<C> shape_;
  ForwardScratch<C> scratch_;
  Dropout dropout_;
  Sequence sequence_{};
  int64_t kv_head_ = 0, count_ = 0;
  Range visible_{};
};

template <class C>
Plan plan_forward(const AttentionProblem& p) {
  const ForwardShape<C> shape(p);
  Arena measure(nullptr);
  ForwardScratch<C>(measure, p, shape);
  Plan plan;
  plan.phases[plan.phase_count++] = {p.batch * p.kv_heads * shape.jobs_per_group, ForwardJob<C>::run};
  plan.scratch_bytes = measure.used();
  return plan;
}

}  // namespace
}  // namespace attention_ext
