// The products of decoding, a few queries against many keys: rows as they lie in memory, read once for four queries,
// while later ones are prefetched.
#pragma once

#include <type_traits>

#include "cpu/kernels/pack.h"

namespace attention_ext {
namespace {

// A vector of dot products of kRows queries and as many keys as fill it: lanes (query, key). Each number of a key is
// read and widened once for all the queries.
template <class T, int kRows, class Storage>
ATTENTION_INLINE Vec<T> dot_products(Matrix<const T> query, const Storage* key, int64_t key_stride, int64_t width,
                                     RowsAhead& ahead) {
  constexpr int kSomeKeys = kLanes<T> / kRows;
  Vec<T> sum[kLanes<T>] = {};
  for (int64_t d = 0; d < width; d += kLanes<T>) {
    ahead.step();
    Vec<T> numbers[kSomeKeys];
    unroll<kSomeKeys>(UNROLLED(i) { numbers[i] = load_as(key + i * key_stride + d); });
    unroll<kRows>(UNROLLED(r) {
      const Vec<T> q = load(query.row(r) + d);
      unroll<kSomeKeys>(UNROLLED(i) { sum[r * kSomeKeys + i] = fma(numbers[i], q, sum[r * kSomeKeys + i]); });
    });
  }
  return sum_each(sum);
}

// Scores of kRows queries and a vector of keys, in kRows * width / kLanes steps.
template <class T, int kRows, class Storage>
ATTENTION_INLINE void score_keys(Matrix<const T> query, const Storage* key, int64_t key_stride, int64_t width,
                                 Matrix<T> score, RowsAhead& ahead) {
  constexpr int kSomeKeys = kLanes<T> / kRows;
  for (int64_t i = 0; i < kLanes<T>; i += kSomeKeys) {
    alignas(64) T products[kLanes<T>];
    store(products, dot_products<T, kRows>(query, key + i * key_stride, key_stride, width, ahead));
    unroll<kRows>(UNROLLED(r) { __builtin_memcpy(score.row(r) + i, products + r * kSomeKeys, kSomeKeys * sizeof(T)); });
  }
}

// The same for fewer keys than lanes, one dot product at a time.
template <class T, int kRows, class Storage>
ATTENTION_INLINE void score_few_keys(Matrix<const T> query, const Storage* key, int64_t key_stride, int64_t keys,
                                     int64_t width, Matrix<T> score) {
  for (int64_t i = 0; i < keys; ++i) {
    Vec<T> sum[kRows] = {};
    for (int64_t d = 0; d < width; d += kLanes<T>) {
      const Vec<T> numbers = load_as(key + i * key_stride + d);
      unroll<kRows>(UNROLLED(r) { sum[r] = fma(numbers, load(query.row(r) + d), sum[r]); });
    }
    unroll<kRows>(UNROLLED(r) { score.row(r)[i] = sum_lanes<T>(sum[r]); });
  }
}

// sums (row, column) += score (row, key) value (key, column), for kRows queries, in as many steps as keys.
template <class T, int kRows, int kVectors, class Storage>
ATTENTION_INLINE void add_values(Matrix<const T> score, const Storage* value, int64_t value_stride, int64_t keys,
                                 Matrix<T> sums, RowsAhead& ahead) {
  Vec<T> sum[kRows][kVectors];
  unroll<kRows>(UNROLLED(r) { unroll<kVectors>(UNROLLED(n) { sum[r][n] = load(sums.row(r) + n * kLanes<T>); }); });
  for (int64_t k = 0; k < keys; ++k) {
    ahead.step();
    Vec<T> row[kVectors];
    unroll<kVectors>(UNROLLED(n) { row[n] = load_as(value + k * value_stride + n * kLanes<T>); });
    unroll<kRows>(UNROLLED(r) {
      const Vec<T> weight = broadcast(score.row(r) + k);
      unroll<kVectors>(UNROLLED(n) { sum[r][n] = fma(weight, row[n], sum[r][n]); });
    });
  }
  unroll<kRows>(UNROLLED(r) { unroll<kVectors>(UNROLLED(n) { store(sums.row(r) + n * kLanes<T>, sum[r][n]); }); });
}

template <class T>
constexpr int kTogether = kLanes<T> < 4 ? kLanes<T> : 4;

ATTENTION_INLINE int64_t row_groups(int64_t rows, int64_t together) { return rows / together + rows % together; }

// Calls f(row, count) for queries by fours, as far as lanes allow, then one by one; count is a constant.
template <class T, class F>
ATTENTION_INLINE void for_row_groups(int64_t rows, F&& f) {
  int64_t r = 0;
  for (; r + kTogether<T> <= rows; r += kTogether<T>) f(r, std::integral_constant<int, kTogether<T>>{});
  for (; r < rows; ++r) f(r, std::integral_constant<int, 1>{});
}

// Calls f(data, stride) with rows as they lie in memory where whole vectors can be read from it, else with a copy.
template <class T, class F>
ATTENTION_INLINE void with_rows(const Source& from, int64_t rows, int64_t columns, T* buffer, F&& f) {
  const int64_t width = round_up(columns, kLanes<T>);
  if (from.stride_col == 1 && columns == width) {
    with_storage<T>(from.dtype, [&](auto* storage) __attribute__((always_inline)) {
      f(reinterpret_cast<decltype(storage)>(const_cast<char*>(from.data)), from.stride_row);
    });
    return;
  }
  copy_rows(from, rows, rows, columns, Matrix<T>{buffer, width});
  f(buffer, width);
}

}  // namespace
}  // namespace attention_ext
