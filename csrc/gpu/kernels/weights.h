// The attention weights themselves, for people who look: prob = exp(score - logsumexp), after dropout; per head, or
// averaged over heads without a buffer per head.
#pragma once

#include "gpu/kernels/gradient.h"

namespace attention_ext {
namespace {

template <class C, int kDim, ScoreMode kMode>
class Weights {
  using T = typename C::Scalar;
  using E = typename C::Element;
  using Shape = GradientShape<C, kDim, Order::kFirst>;
  static constexpr int kQueries = Shape::kWarps * kFragmentRows, kKeys = Shape::kRows;
  static constexpr int kTiles = kKeys / kFragmentColumns;
  using QueryTile = SharedTile<E, kQueries, kDim>;
  using QueryTiles = TileSet<QueryTile, 1>;
  using KeyTiles = TileSet<SharedTile<E, kKeys, kDim>, 1>;
  using Scores = Fragments<T, 1, kTiles>;

 public:
  using Problem = WeightsProblem;
  static constexpr int kThreads = Shape::kWarps * kWarpSize;
  static constexpr size_t kSharedBytes = QueryTiles::kBytes + KeyTiles::kBytes;

  static int64_t blocks(const WeightsProblem& p) { return p.batch * head_runs(p) * query_tiles(p) * key_tiles(p); }

  ATTENTION_DEVICE static void run(const WeightsProblem& p, void*) {
    const int64_t key_tile = block_index() % key_tiles(p), rest = block_index() / key_tiles(p);
    const int64_t query_tile = rest % query_tiles(p), run = rest / query_tiles(p);
    const int64_t q = p.row_begin + query_tile * kQueries, k = key_tile * kKeys;
    Weights(p, {q, minimum(q + kQueries, p.row_end)}, {k, minimum(k + kKeys, p.seqlen_k)})
        .mainloop(run / head_runs(p), run % head_runs(p));
  }

 private:
  ATTENTION_INLINE static int64_t head_runs(const WeightsProblem& p) { return p.average_heads ? 1 : p.heads; }
  ATTENTION_INLINE static int64_t query_tiles(const WeightsProblem& p) {
    return ceil_div(p.row_end - p.row_begin, kQueries);
  }
  ATTENTION_INLINE static int64_t key_tiles(const WeightsProblem& p) { return ceil_div(p.seqlen_k, kKeys); }

  ATTENTION_DEVICE Weights(const WeightsProblem& p, Range q, Range k)
      : p_(p), q_(q), k_(k), row_(thread_index() / kWarpSize * kFragmentRows), dropout_(dropout_by<kMode, T>(p)) {}

  ATTENTION_DEVICE void mainloop(int64_t batch, int64_t run) {
    sums_.clear();
    for (int64_t h = 0; h < p_.heads / head_runs(p_); ++h) add_head(looped<kMode, T>(Head(p_, batch, run + h)));
    const int64_t averaged = p_.heads / head_runs(p_);
    const auto share = static_cast<T>(dropout_.kept_scale) / static_cast<T>(averaged);
    const T factor[2] = {share, share};
    Rows<E> to = rows_of<E>(p_.weights, batch, run, 0, k_.size());
    to.data += k_.begin * to.stride_col;
    store_rows(to, q_.begin - p_.row_begin + row_, q_.end - p_.row_begin, sums_.tile[0], factor);
  }

  ATTENTION_DEVICE void add_head(const Head& head) {
    const Range seen = visible_keys(p_, head.sequence, q_);
    const Range valid{maximum(k_.begin, seen.begin), minimum(k_.end, seen.end)};
    if (valid.empty() || (kMode == ScoreMode::kAll && is_empty(p_, head, q_, valid))) return;
    const QueryTiles queries(shared_memory());
    const KeyTiles keys(shared_memory() + QueryTiles::kBytes);
    const Corner corner{static_cast<int>(q_.begin) + row_, static_cast<int>(k_.begin)};
    copy_set<kThreads>(queries, Sources<E, 1>{{head_rows<E>(head, p_.query, p_.head_dim)}}, static_cast<int>(q_.begin),
                       Span(q_));
    copy_set<kThreads>(keys, Sources<E, 1>{{key_rows<E>(head, p_.key, p_.head_dim)}}, corner.k, Span(valid));
    commit_copies();
    wait_copies<0>();
    synchronize_block();
    Scores score;
    score.clear();
    multiply_rows<C>(score, TileRows<C, QueryTile>{queries.tile[0], row_}, keys.tile[0], 0);
    const auto block = ScoreBlock<T, kMode>::template of<kTiles>(
        p_, head, corner, is_partial<kMode>(p_, head, q_, {k_.begin, k_.begin + kKeys}));
    const LogsumexpRows<T> rows(p_, head, p_.logsumexp);
    const auto scores = block.scores(score.tile[0]);
    for_each_kept<1, kTiles>(block, dropout_, [&](int, int n, int i, bool kept) {
      const int q = block.query(0, n, i);
      const T dot = score_at(scores, n, i).score;
      if (kept) sums_.tile[0][n].number[i] += weight_of<kMode>(dot, block.exp_scale(), rows.row(q));
    });
    synchronize_block();
  }

  const WeightsProblem& p_;
  const Range q_, k_;
  const int row_;  // of the tile, the warp's first
  const Dropout dropout_;
  Scores sums_;
};

template <class C>
KernelPlan plan_weights_by_shape(const AttentionProblem& problem) {
  const auto& p = static_cast<const WeightsProblem&>(problem);
  return with_shape(p, [&](auto dim, auto mode) {
    using Kernel = Weights<C, dim, mode>;
    KernelPlan plan;
    add_launch<Kernel>(plan, Kernel::blocks(p));
    return plan;
  });
}

}  // namespace
}  // namespace attention_ext
