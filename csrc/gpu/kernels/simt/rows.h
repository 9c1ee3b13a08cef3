// Rows of any length and dtype, worked on by a warp. Lanes are neighbours along a row; the dtype is asked for at run
// time.
#pragma once

#include "gpu/kernels/backward_memory.h"
#include "gpu/kernels/rows.h"

namespace attention_ext {
namespace {
namespace simt {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;

ATTENTION_DEVICE int warp_index() { return thread_index() / kWarpSize; }

// Calls f with a number of the storage type; T is the accumulate type.
template <class T, class F>
ATTENTION_DEVICE auto with_element(DType dtype, F&& f) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return f(double{});
  } else {
    if (dtype == DType::kBFloat16) return f(BFloat16{});
    if (dtype == DType::kFloat16) return f(Half{});
    return f(float{});
  }
}

// Kernels with a warp for each query.
template <class ProblemType>
struct QueryKernel {
  using Problem = ProblemType;
  static constexpr int kThreads = simt::kThreads;
  static constexpr size_t kSharedBytes = 0;

  static int64_t blocks(const AttentionProblem& p) { return QueryTileIndex::count(p, kWarps); }

  // Calls f(head, q) with the query of this warp, unless the sequence has ended.
  template <class F>
  ATTENTION_DEVICE static void with_query(const Problem& p, F&& f) {
    const QueryTileIndex at(p, kWarps);
    const Head head(p, at.batch, at.head);
    const int q = static_cast<int>(at.tile) * kWarps + warp_index();
    if (q < head.length_q) f(head, q);
  }
};

// Of one head, from row 0 of a sequence on.
struct HeadRows {
  View view;
  int64_t first;
  int columns;

  ATTENTION_DEVICE explicit operator bool() const { return static_cast<bool>(view); }

  template <class E>
  ATTENTION_DEVICE Rows<E> row(int64_t i) const {
    return {static_cast<E*>(view.data) + first + i * view.stride_row, 0, view.stride_col, columns};
  }
};

ATTENTION_DEVICE HeadRows query_rows(const Head& head, const View& view, int64_t columns) {
  const Sequence& s = head.sequence;
  return {view, s.tensor_batch * view.stride_b + head.head * view.stride_h + s.begin_q * view.stride_row,
          static_cast<int>(columns)};
}

ATTENTION_DEVICE HeadRows key_rows(const Head& head, const View& view, int64_t columns) {
  const Sequence& s = head.sequence;
  return {view, s.tensor_batch * view.stride_b + head.kv_head * view.stride_h + s.begin_k * view.stride_row,
          static_cast<int>(columns)};
}

// Every lane has the result.
template <class T>
ATTENTION_DEVICE T dot(const HeadRows& a, int64_t row_a, const HeadRows& b, int64_t row_b) {
  return with_element<T>(a.view.dtype, [&]<class E>(E) {
    const Rows<E> x = a.row<E>(row_a), y = b.row<E>(row_b);
    T sum = 0;
    ATTENTION_UNROLL_BY(4)
    for (int d = lane_index(); d < a.columns; d += kWarpSize) {
      sum = multiply_add(widen(x.data[d * x.stride_col]), widen(y.data[d * y.stride_col]), sum);
    }
    return sum_of_warp(sum);
  });
}

// A sum of rows times factors, as many of its columns as registers hold; for the others the loop runs again.
template <class T>
struct RowSum {
  static constexpr int kLaneColumns = 16, kColumns = kLaneColumns * kWarpSize;
  const int begin;
  T number[kLaneColumns] = {};

  // Calls f(column, sum) for the columns of this lane.
  template <class F>
  ATTENTION_DEVICE void for_each(int columns, F&& f) {
    ATTENTION_UNROLL
    for (int i = 0; i < kLaneColumns; ++i) {
      const int column = begin + i * kWarpSize + lane_index();
      if (column < columns) f(column, number[i]);
    }
  }

  ATTENTION_DEVICE void multiply(T factor) {
    for_each(begin + kColumns, [&](int, T& sum) { sum *= factor; });
  }

  ATTENTION_DEVICE void add(T factor, const HeadRows& rows, int64_t row) {
    with_element<T>(rows.view.dtype, [&]<class E>(E) {
      const Rows<E> from = rows.row<E>(row);
      for_each(from.columns,
               [&](int d, T& sum) { sum = multiply_add(factor, widen(from.data[d * from.stride_col]), sum); });
    });
  }

  // With a row, over the columns held.
  ATTENTION_DEVICE T dot(const HeadRows& rows, int64_t row) {
    return with_element<T>(rows.view.dtype, [&]<class E>(E) {
      const Rows<E> with = rows.row<E>(row);
      T product = 0;
      for_each(with.columns,
               [&](int d, T& sum) { product = multiply_add(sum, widen(with.data[d * with.stride_col]), product); });
      return sum_of_warp(product);
    });
  }

  ATTENTION_DEVICE void store(T factor, const HeadRows& rows, int64_t row) {
    with_element<T>(rows.view.dtype, [&]<class E>(E) {
      const Rows<E> to = rows.row<E>(row);
      for_each(to.columns, [&](int d, T& sum) { to.data[d * to.stride_col] = rounded<E>(sum * factor); });
    });
  }
};

// Calls f with a RowSum for each part of the columns, and once where there are none.
template <class T, class F>
ATTENTION_DEVICE void for_each_part(int64_t columns, F&& f) {
  int begin = 0;
  do {
    f(RowSum<T>{begin});
    begin += RowSum<T>::kColumns;
  } while (begin < columns);
}

}  // namespace simt
}  // namespace
}  // namespace attention_ext
