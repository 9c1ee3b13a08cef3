// grad_query and the gradient of a head's slope: a block of threads loops over the keys for a tile of queries. Where
// tiles are few, several blocks share the keys of each, and what they find is added up in the order of the parts.
#pragma once

#include "gpu/kernels/gradient.h"
#include "gpu/kernels/key_parts.h"

namespace attention_ext {
namespace {

// The result of a row: its gradient, or only its delta, from weights that were never rounded.
enum class QueryResult : uint8_t { kGradient, kDelta };

template <class C, int kDim, ScoreMode kMode, Order kOrder, QueryResult kResult = QueryResult::kGradient>
class QueryGradient {
  using T = typename C::Scalar;
  using E = typename C::Element;
  using Shape = GradientShape<C, kDim, kOrder, kMode>;
  // A warp owns 32 queries where registers hold their sums and operands: keys are read half as often.
  static constexpr bool kHigh = Shape::kFirst && Shape::kHoldsOwn && kDim <= 64 && kMode == ScoreMode::kMask;
  static constexpr int kRowTiles = kHigh ? 2 : 1, kColumns = kHigh && kDim > 32 ? 16 : Shape::kColumns;

 public:
  using Problem = ProblemOf<kOrder>;
  static constexpr int kQueries = Shape::kWarps * kRowTiles * kFragmentRows;
  static constexpr int kThreads = Shape::kWarps * kWarpSize;

 private:
  static constexpr int kTiles = kColumns / kFragmentColumns;
  using QueryTile = SharedTile<E, kQueries, kDim>;
  using QueryTiles = TileSet<QueryTile, kQuerySources<kOrder>>;
  using OwnQueries = OwnRows<C, QueryTile, kQuerySources<kOrder>, Shape::kHoldsOwn, kRowTiles>;
  using KeyTile = StreamedTile<C, Shape, kDim>;
  using KeyTiles = TileSet<KeyTile, kKeySources<kOrder>>;
  using Sums = Fragments<T, kRowTiles, kDim / kFragmentColumns>;

 public:
  static constexpr size_t kSharedBytes =
      maximum(QueryTiles::kBytes, OwnQueries::kBytes + kStreamBytes<KeyTile, kKeySources<kOrder>, Shape::kStages>);
  static_assert(kSharedBytes <= Shape::kSharedBytesAllowed);

  ATTENTION_INLINE static int64_t tiles(const AttentionProblem& p) { return QueryTileIndex::count(p, kQueries); }
  ATTENTION_INLINE static int64_t parts(const Problem& p) {
    constexpr bool kSplits = kOrder == Order::kFirst && kResult == QueryResult::kGradient;
    return kSplits && !p.grad_alibi_slopes ? count_of_parts(p, tiles(p), kQueries) : 1;
  }
  static int64_t blocks(const AttentionProblem& p) { return tiles(p) * parts(static_cast<const Problem&>(p)); }

  ATTENTION_DEVICE static void run(const Problem& p, void* workspace) {
    const int64_t part = block_index() / tiles(p);
    const QueryTileIndex at(p, kQueries, block_index() % tiles(p));
    const Head head = looped<kMode, T>(Head(p, at.batch, at.head));
    QueryGradient(p, BackwardMemory<T>(p, workspace), head, at.queries(head.sequence, kQueries), part).mainloop();
  }

 private:
  ATTENTION_DEVICE QueryGradient(const Problem& p, const BackwardMemory<T>& memory, const Head& head, Range q,
                                 int64_t part)
      : p_(p),
        memory_(memory),
        head_(head),
        q_(q),
        part_(part),
        row_(thread_index() / kWarpSize * kRowTiles * kFragmentRows),
        dropout_(dropout_by<kMode, T>(p)) {
    const RowSource<T, kOrder> source(p, head, memory);
    ATTENTION_UNROLL
    for (int r = 0; r < 2 * kRowTiles; ++r) {
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
      const Range seen = visible_keys(p_, head_.sequence, q_);
      OwnQueries own(queries, row_);
      own.load();
      const auto add_tiles = [&](int k, const KeyTiles& keys, int) {
        const bool partial = is_partial<kMode>(p_, head_, q_, {k, k + Shape::kRows});
        for (int row = 0; row < rows; row += kColumns) {
          const auto block = ScoreBlock<T, kMode>::template of<kTiles>(
              p_, head_, {static_cast<int>(q_.begin) + row_, k + row}, partial);
          add_block(block, own, keys, row);
        }
      };
      stream_rows<kThreads, Shape::kStages, KeyTile>(shared_memory() + OwnQueries::kBytes, key_sources<E>(p_, head_),
                                                     part_of_keys(seen, Shape::kRows, part_, parts(p_)),
                                                     seen_keys<kMode, KeyTile::kRows>(p_, head_, head_.heads(), q_),
                                                     add_tiles);
    }
    epilogue();
  }

  ATTENTION_DEVICE void add_block(const ScoreBlock<T, kMode>& block, const OwnQueries& queries, const KeyTiles& keys,
                                  int row) {
    GradientBlock<C, kMode, kOrder, false, kTiles, kRowTiles> products;
    products.multiply(p_, queries, keys, row);
    const bool any = products.differentiate(
        p_, block, dropout_, [&](int m, int, int i) { return rows_[2 * m + i / 2]; },
        [&](const auto& gradients) { add_sums(block, gradients); });
    if constexpr (kResult == QueryResult::kGradient) {
      // Keys that are hidden from all these rows may hold anything.
      if (p_.grad_query && any_in_warp(any)) products.add_gradient(p_, sums_, keys, row);
    }
  }

  // Of gradients of scores: for delta, each row's; or for the slope, all of them by their distances.
  template <class Gradients>
  ATTENTION_DEVICE void add_sums(const ScoreBlock<T, kMode>& block, const Gradients& gradients) {
    if constexpr (kResult == QueryResult::kDelta) {
      T deltas[2 * kRowTiles] = {};
      for_each_number<kRowTiles, kTiles>(
          [&](int m, int n, int i) { deltas[2 * m + i / 2] += gradients.tile[m][n].number[i]; });
      ATTENTION_UNROLL
      for (int r = 0; r < 2 * kRowTiles; ++r) delta_sums_[r] += deltas[r];
    } else if (kMode == ScoreMode::kAll && p_.grad_alibi_slopes) {
      T slopes = 0;
      for_each_number<kRowTiles, kTiles>([&](int m, int n, int i) {
        const auto at = block.at(block.query(m, n, i), block.key(m, n, i));
        slopes += gradients.tile[m][n].number[i] * head_.mods.alibi.slope_grad<NumberOps<T>>(at);
      });
      slope_sum_.add(slopes);
    }
  }

  ATTENTION_DEVICE void epilogue() {
    if constexpr (kResult == QueryResult::kDelta) {
      ATTENTION_UNROLL
      for (int r = 0; r < 2 * kRowTiles; ++r) {
        const T delta = sum_of_group(delta_sums_[r]);
        const int64_t q = q_.begin + row_ + r * 8 + lane_group();
        if (lane_member() == 0 && q < q_.end)
          memory_.store_delta(p_, row_of(p_, head_.sequence, head_.head) + q, delta);
      }
    } else {
      if (p_.grad_query) store();
      if (p_.grad_alibi_slopes) {
        sum_block<kThreads>(slope_sum_.total(), memory_.slope_sums + QueryTileIndex(p_, kQueries).number);
      }
    }
  }

  ATTENTION_DEVICE void store() const {
    if (parts(p_) == 1) {
      store(head_rows<E>(head_, p_.grad_query, p_.head_dim), static_cast<T>(p_.scale));
    } else {
      T* const first = memory_.query_part(p_, part_, row_of(p_, head_.sequence, head_.head));
      store(Rows<T>{first, p_.head_dim, 1, p_.head_dim}, T(1));
    }
  }
  template <class Result>
  ATTENTION_DEVICE void store(const Rows<Result>& to, T scale) const {
    const T factor[2] = {scale, scale};
    ATTENTION_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      store_rows(to, q_.begin + row_ + m * kFragmentRows, q_.end, sums_.tile[m], factor);
    }
  }

  const Problem& p_;
  const BackwardMemory<T>& memory_;
  const Head& head_;
  const Range q_;
  const int64_t part_;  // of the keys
  const int row_;       // of the tile, the warp's first
  const Dropout dropout_;
  RowNumbers<T, kOrder> rows_[2 * kRowTiles];  // two for each row tile: those of the lane's group, and 8 further
  Sums sums_;
  T delta_sums_[2 * kRowTiles] = {};
  LongSum<T> slope_sum_;
};

// Adds up the parts of grad_query, a thread for each number. What it writes for queries that no sequence owns is
// cleared afterwards.
template <class C, class Queries>
struct SumQueryParts {
  using T = typename C::Scalar;
  using E = typename C::Element;
  using Problem = BackwardProblem;
  static constexpr int kThreads = 128;
  static constexpr size_t kSharedBytes = 0;

  static int64_t blocks(const BackwardProblem& p) {
    return ceil_div(BackwardMemory<T>::rows(p) * p.head_dim, kThreads);
  }

  ATTENTION_DEVICE static void run(const BackwardProblem& p, void* workspace) {
    const BackwardMemory<T> memory(p, workspace);
    const int64_t at = block_index() * kThreads + thread_index(), row = at / p.head_dim, d = at % p.head_dim;
    if (row >= memory.rows(p)) return;
    T sum = 0;
    for (int64_t part = 0; part < Queries::parts(p); ++part) sum += memory.query_part(p, part, row)[d];
    const int64_t head = row / p.seqlen_q;
    const Rows<E> to = rows_of<E>(p.grad_query, head / p.heads, head % p.heads, row % p.seqlen_q, p.head_dim);
    to.data[d * to.stride_col] = rounded<E>(sum * static_cast<T>(p.scale));
  }
};

}  // namespace
}  // namespace attention_ext
