// grad_query and the gradient of a head's slope: a block of threads loops over the keys for a tile of queries.
#pragma once

#include "gpu/kernels/gradient.h"

namespace attention_ext {
namespace {

// The result of a row: its gradient, or only its delta, from weights that were never rounded.
enum class QueryResult : uint8_t { kGradient, kDelta };

template <class C, int kDim, ScoreMode kMode, Order kOrder, QueryResult kResult = QueryResult::kGradient>
class QueryGradient {
  using T = typename C::Scalar;
  using E = typename C::Element;
  using Shape = GradientShape<C, kDim, kOrder>;

 public:
  using Problem = ProblemOf<kOrder>;
  static constexpr int kQueries = Shape::kWarps * kFragmentRows;
  static constexpr int kThreads = Shape::kWarps * kWarpSize;

 private:
  static constexpr int kTiles = Shape::kColumns / kFragmentColumns;
  using QueryTile = SharedTile<E, kQueries, kDim>;
  using QueryTiles = TileSet<QueryTile, kQuerySources<kOrder>>;
  using OwnQueries = OwnRows<C, QueryTile, kQuerySources<kOrder>, Shape::kHoldsOwn>;
  using KeyTile = SharedTile<E, Shape::kRows, kDim>;
  using KeyTiles = TileSet<KeyTile, kKeySources<kOrder>>;
  using Sums = Fragments<T, 1, kDim / kFragmentColumns>;

 public:
  static constexpr size_t kSharedBytes = QueryTiles::kBytes + Shape::kStages * KeyTiles::kBytes;
  static_assert(kSharedBytes <= Shape::kSharedBytesAllowed);

  static int64_t blocks(const AttentionProblem& p) { return QueryTileIndex::count(p, kQueries); }

  ATTENTION_DEVICE static void run(const Problem& p, void* workspace) {
    const QueryTileIndex at(p, kQueries);
    const Head head(p, at.batch, at.head);
    QueryGradient(p, BackwardMemory<T>(p, workspace), head, at.queries(head.sequence, kQueries)).mainloop();
  }

 private:
  ATTENTION_DEVICE QueryGradient(const Problem& p, const BackwardMemory<T>& memory, const Head& head, Range q)
      : p_(p),
        memory_(memory),
        head_(head),
        q_(q),
        row_(thread_index() / kWarpSize * kFragmentRows),
        dropout_(dropout_by<kMode>(p)) {
    const RowSource<T, kOrder> source(p, head, memory);
    for (int r = 0; r < 2; ++r) {
      rows_[r] = source.row(static_cast<int>(q.begin) + row_ + r * 8 + lane_group());
      if (kResult == QueryResult::kDelta) rows_[r].delta = T(0);
    }
  }

  ATTENTION_DEVICE void mainloop() {
    sums_.clear();
    if (!q_.empty()) {
      const QueryTiles queries(shared_memory());
      copy_set<kThreads>(queries, query_sources<E>(p_, head_), static_cast<int>(q_.begin), Span(q_));
      const int rows = q_.begin + row_ < q_.end ? Shape::kRows : 0;  // a warp without queries only helps to copy
      OwnQueries own(queries, row_);
      own.load();
      const auto add_tiles = [&](int k, const KeyTiles& keys, int) {
        const bool partial = is_partial(head_, q_, {k, k + Shape::kRows});
        for (int row = 0; row < rows; row += Shape::kColumns) {
          add_block({p_, head_, {static_cast<int>(q_.begin) + row_, k + row}, partial}, own, keys, row);
        }
      };
      stream_rows<kThreads, Shape::kStages, KeyTile>(shared_memory() + QueryTiles::kBytes, key_sources<E>(p_, head_),
                                                     visible_keys(p_, head_.sequence, q_), add_tiles);
    }
    epilogue();
  }

  ATTENTION_DEVICE void add_block(const ScoreBlock<T, kMode>& block, const OwnQueries& queries, const KeyTiles& keys,
                                  int row) {
    GradientBlock<C, kMode, kOrder, false, kTiles> products;
    products.multiply(p_, queries, keys, row);
    T slopes = 0, deltas[2] = {};
    const bool any = products.differentiate(
        p_, block, dropout_, [&](int, int i) { return rows_[i / 2]; },
        [&](int n, int i, T gradient) {
          if constexpr (kResult == QueryResult::kDelta) {
            deltas[i / 2] += gradient;
          } else if (kMode == ScoreMode::kAll && p_.grad_alibi_slopes) {
            const auto at = block.at(block.query(0, n, i), block.key(0, n, i));
            slopes += gradient * head_.mods.alibi.slope_grad<NumberOps<T>>(at);
          }
        });
    if constexpr (kResult == QueryResult::kDelta) {
      for (int r = 0; r < 2; ++r) delta_sums_[r] += deltas[r];
    } else {
      if (kMode == ScoreMode::kAll && p_.grad_alibi_slopes) slope_sum_.add(slopes);
      // Keys that are hidden from all these rows may hold anything.
      if (p_.grad_query && any_in_warp(any)) products.add_gradient(p_, sums_, keys, row);
    }
  }

  ATTENTION_DEVICE void epilogue() {
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
      if (p_.grad_alibi_slopes) sum_block<kThreads>(slope_sum_.total(), memory_.slope_sums + block_index());
    }
  }

  const Problem& p_;
  const BackwardMemory<T>& memory_;
  const Head& head_;
  const Range q_;
  const int row_;  // of the tile, the warp's first
  const Dropout dropout_;
  RowNumbers<T, kOrder> rows_[2];
  Sums sums_;
  T delta_sums_[2] = {};
  LongSum<T> slope_sum_;
};

}  // namespace
}  // namespace attention_ext
