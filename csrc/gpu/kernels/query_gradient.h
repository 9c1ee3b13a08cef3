// grad_query and what a head's slopes receive: a block of threads walks the keys for a tile of queries.
#pragma once

#include "gpu/kernels/backward_memory.h"
#include "gpu/kernels/gradient.h"
#include "gpu/kernels/key_walk.h"
#include "gpu/kernels/shape.h"

namespace attention_ext {
namespace {

// What becomes of the rows: their gradients, or only their delta, from weights that were never rounded.
enum class QueryResult : uint8_t { kGradient, kDelta };

template <class C, int kDim, Rules kRules, QueryResult kResult>
class QueryGradient {
  using Shape = BackwardShape<C, kDim>;

 public:
  static constexpr int kQueries = Shape::kWarps * kFragmentRows;

 private:
  using T = typename C::Scalar;
  using E = typename C::Element;
  static constexpr int kKeyTiles = Shape::kColumns / kFragmentColumns;
  using QueryTile = SharedTile<E, kQueries, kDim>;
  using KeyTile = SharedTile<E, Shape::kRows, kDim>;
  using Scores = Fragments<T, 1, kKeyTiles>;
  using Sums = Fragments<T, 1, kDim / kFragmentColumns>;

 public:
  using Problem = BackwardProblem;
  static constexpr int kThreads = Shape::kWarps * kWarpSize;
  static constexpr size_t kSharedBytes = 2 * QueryTile::kBytes + 2 * Shape::kStages * KeyTile::kBytes;

  static int64_t blocks(const AttentionProblem& p) { return p.batch * p.heads * ceil_div(p.max_seqlen_q, kQueries); }

  ATTENTION_DEVICE static void run(const BackwardProblem& p, void* workspace) {
    const QueryTileIndex at(p, kQueries);
    const Head head(p, at.batch, at.head);
    QueryGradient(p, BackwardMemory<T>(p, workspace), head, at.queries(head.sequence, kQueries)).walk();
  }

 private:
  ATTENTION_DEVICE QueryGradient(const BackwardProblem& p, const BackwardMemory<T>& memory, const Head& head, Range q)
      : p_(p),
        memory_(memory),
        head_(head),
        q_(q),
        row_(thread_index() / kWarpSize * kFragmentRows),
        dropout_(dropout_by<kRules>(p)) {
    const RowSource<T> source(p, head, memory.delta);
    for (int r = 0; r < 2; ++r) {
      rows_[r] = source.row(static_cast<int>(q.begin) + row_ + r * 8 + lane_group());
      if (kResult == QueryResult::kDelta) rows_[r].delta = T(0);
    }
  }

  ATTENTION_DEVICE void walk() {
    SharedArena arena{shared_memory()};
    const auto query = arena.take<QueryTile>(), grad_out = arena.take<QueryTile>();
    sums_.clear();
    if (!q_.empty()) {
      const int first = static_cast<int>(q_.begin);
      copy_rows<kThreads>(query, head_rows<E>(head_, p_.query, p_.head_dim), first, Span(q_));
      copy_rows<kThreads>(grad_out, head_rows<E>(head_, p_.grad_out, p_.head_dim_v), first, Span(q_));
      const Rows<E> sources[] = {key_rows<E>(head_, p_.key, p_.head_dim), key_rows<E>(head_, p_.value, p_.head_dim_v)};
      walk_rows<kThreads, Shape::kStages, KeyTile>(arena, sources, visible_keys(p_, head_.sequence, q_),
                                                   [&](int k, auto&& tile_of) {
                                                     for (int row = 0; row < Shape::kRows; row += Shape::kColumns) {
                                                       add_block(query, grad_out, k + row, tile_of(0), tile_of(1), row);
                                                     }
                                                   });
    }
    close_rows();
  }

  ATTENTION_DEVICE void add_block(const QueryTile& query, const QueryTile& grad_out, int k, const KeyTile& key,
                                  const KeyTile& value, int row) {
    const ScoreBlock<T, kRules> block{
        p_, head_, {static_cast<int>(q_.begin) + row_, k}, is_partial(head_, q_, {k, k + Shape::kColumns})};
    Scores weight, grad;
    weight.clear();
    grad.clear();
    multiply_rows<C>(weight, query, row_, key, row);
    multiply_rows<C>(grad, grad_out, row_, value, row);
    T slopes = 0, deltas[2] = {};
    const bool any = differentiate(
        block, dropout_, weight, grad, [&](int, int i) { return rows_[i / 2]; },
        [&](int n, int i, T gradient) {
          if constexpr (kResult == QueryResult::kDelta) {
            deltas[i / 2] += gradient;
          } else if (kRules == Rules::kAll && p_.grad_alibi_slopes) {
            const auto at = block.at(block.query(0, n, i), block.key(0, n, i));
            slopes += gradient * head_.mods.alibi.by_slope<NumberOps<T>>(at);
          }
        });
    if constexpr (kResult == QueryResult::kDelta) {
      for (int r = 0; r < 2; ++r) delta_sums_[r] += deltas[r];
    } else {
      slope_sum_ += static_cast<double>(slopes);
      // Keys that are hidden from all these rows may hold anything.
      if (p_.grad_query && any_in_warp(any)) multiply_weights<C>(sums_, grad, key, row);
    }
  }

  ATTENTION_DEVICE void close_rows() {
    if constexpr (kResult == QueryResult::kDelta) {
      for (int r = 0; r < 2; ++r) {
        const T delta = sum_of_group(delta_sums_[r]);
        const int64_t q = q_.begin + row_ + r * 8 + lane_group();
        if (lane_member() == 0 && q < q_.end)
          memory_.store_delta(p_, row_of(p_, head_.sequence, head_.head) + q, delta);
      }
    } else {
      if (p_.grad_query) {
        const T factor[2] = {static_cast<T>(p_.scale), static_cast<T>(p_.scale)};
        store_rows(head_rows<E>(head_, p_.grad_query, p_.head_dim), q_.begin + row_, q_.end, sums_.tile[0], factor);
      }
      if (p_.grad_alibi_slopes) sum_block<kThreads>(slope_sum_, memory_.slope_sums + block_index());
    }
  }

  const BackwardProblem& p_;
  const BackwardMemory<T>& memory_;
  const Head& head_;
  const Range q_;
  const int row_;  // of the tile, the warp's first
  const Dropout dropout_;
  RowNumbers<T> rows_[2];
  Sums sums_;
  T delta_sums_[2] = {};
  double slope_sum_ = 0;
};

}  // namespace
}  // namespace attention_ext
