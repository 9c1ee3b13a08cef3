// The products of keys with a tile's queries, and of values with its rows of grad_out. Queries lie across lanes; of a
// sequence with few, where most lanes would be empty, dot products are made one by one, as decoding makes them. Which
// of the two depends on the sequence alone, so that all passes round a score alike.
#pragma once

#include "cpu/kernels/decode_products.h"
#include "cpu/kernels/tile.h"

namespace attention_ext {
namespace {

// grad_out . value is made in one pass alone and may be rounded either way: up to this number one by one is faster.
constexpr int64_t kFewGradients = 4;

// A tile's queries as these products read them: (depth, q), or rows (q, d) of the accumulate type if they are few.
template <class C>
struct QueryOperand {
  using T = typename C::Scalar;
  using Element = typename C::Element;
  Matrix<Element> columns;
  Matrix<T> rows;  // data is null unless queries are few
  int64_t depth = 0;

  QueryOperand() = default;

  // `buffer` has room for kQueries columns of whole vectors, and so for kFewQueries rows. few: at most that.
  QueryOperand(Element* buffer, const Tile& tile, int64_t head_dim, int64_t few = kFewQueries)
      : depth(ceil_div(head_dim, C::kPair)) {
    static_assert(kFewQueries <= kQueries<T> / C::kPair && sizeof(T) == sizeof(Element));
    if (tile.sequence.length_q <= few) {
      rows = {reinterpret_cast<T*>(buffer), round_up(head_dim, kLanes<T>)};
    } else {
      columns = {buffer, kQueries<T>};
    }
  }

  // The queries from lane `first` of the tile on.
  ATTENTION_INLINE QueryOperand from(int64_t first) const {
    QueryOperand later = *this;
    if (rows.data) {
      later.rows = rows_from(rows, first);
    } else {
      later.columns = columns_from(columns, first);
    }
    return later;
  }

  void pack(Matrix<const Element> queries, const Tile& tile) const {
    if (!rows.data) return transpose_rows<C>(queries, tile.q.size(), tile.vectors, depth, columns);
    for (int64_t q = 0; q < tile.q.size(); ++q) {
      const auto* from = reinterpret_cast<const typename C::Number*>(queries.row(q));
      for (int64_t d = 0; d < rows.stride; d += kLanes<T>) store(rows.row(q) + d, load_as(from + d));
    }
  }
};

// Out of line, so that the products of all other calls are compiled as if this did not exist.
template <class C>
[[gnu::noinline]] void multiply_few_queries(Matrix<const typename C::Element> key,
                                            Matrix<const typename C::Scalar> query, const Tile& tile,
                                            Matrix<typename C::Scalar> to, int64_t keys, Start start, RowsAhead ahead) {
  using T = typename C::Scalar;
  const int64_t queries = tile.q.size(), width = query.stride, key_stride = key.stride * C::kPair;
  ahead = ahead.in_steps(keys / kLanes<T> * queries * (width / kLanes<T>));
  alignas(64) T numbers[kFewQueries * kLanes<T>] = {};
  const Matrix<T> products{numbers, kLanes<T>};  // (query, key)
  for (int64_t k = 0; k < keys; k += kLanes<T>) {
    const int64_t count = minimum<int64_t>(kLanes<T>, keys - k);
    const auto* some = reinterpret_cast<const typename C::Number*>(key.row(k));
    for_row_groups<T>(queries, [&](int64_t q, auto together) __attribute__((always_inline)) {
      if (count == kLanes<T>) {
        score_keys<T, together>(rows_from(query, q), some, key_stride, width, rows_from(products, q), ahead);
      } else {
        score_few_keys<T, together>(rows_from(query, q), some, key_stride, count, width, rows_from(products, q));
      }
    });
    for (int64_t lane = 0; lane < tile.vectors * kLanes<T>; lane += kLanes<T>) {
      Vec<T> block[kLanes<T>];
      unroll<kLanes<T>>(UNROLLED(i) { block[i] = lane + i < queries ? load(products.row(lane + i)) : Vec<T>{}; });
      transpose(block);
      unroll<kLanes<T>>(UNROLLED(i) {
        T* lanes = to.row(k + i) + lane;
        if (i < count) store(lanes, start == Start::kAdd ? load(lanes) + block[i] : block[i]);
      });
    }
  }
}

// to (key, query) (+)= key (key, depth) query; keys: even. ahead: rows that are needed next.
template <class C>
ATTENTION_INLINE void multiply_queries(Matrix<const typename C::Element> key, const QueryOperand<C>& query,
                                       const Tile& tile, Matrix<typename C::Scalar> to, int64_t keys,
                                       Start start = Start::kZero, RowsAhead ahead = {}) {
  if (query.rows.data) return multiply_few_queries<C>(key, as_operand(query.rows), tile, to, keys, start, ahead);
  multiply<C>(by_rows(key), as_operand(query.columns), query.depth, to, keys, tile.vectors, start, ahead);
}

}  // namespace
}  // namespace attention_ext
