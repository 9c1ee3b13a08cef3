// Operands of the products, from tensors of any dtype and strides. Rows that already lie as a product reads them are
// not copied.
#pragma once

#include <cstddef>

#include "cpu/kernels/matmul.h"

namespace attention_ext {
namespace {

template <class T>
ATTENTION_INLINE Source source_of(Matrix<T> m) {
  return {reinterpret_cast<const char*>(m.data), sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32, m.stride, 1};
}

template <class T>
ATTENTION_INLINE bool stored_as(DType dtype) {
  return dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);
}

// Whole vectors, as many as `count` numbers need.
template <class T>
ATTENTION_INLINE void clear_lanes(T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store(to + i, Vec<T>{});
}

// (rows, columns) to (padded_rows, columns rounded up to whole vectors), the padding 0.
template <class T>
void copy_rows(const Source& from, int64_t rows, int64_t padded_rows, int64_t columns, Matrix<T> to) {
  with_storage<T>(from.dtype, [&](auto* storage) __attribute__((always_inline)) {
    const auto* data = reinterpret_cast<decltype(storage)>(const_cast<char*>(from.data));
    for (int64_t r = 0; r < rows; ++r) {
      const auto* row = data + r * from.stride_row;
      for_each_vector_of_row<T>(columns, [&](int64_t c, auto count) __attribute__((always_inline)) {
        __builtin_prefetch(row + kRowsAhead * from.stride_row + c * from.stride_col);
        store(to.row(r) + c, load_strided<T>(row + c * from.stride_col, from.stride_col, count));
      });
    }
  });
  for (int64_t r = rows; r < padded_rows; ++r) clear_lanes(to.row(r), columns);
}

// Rows that follow one another. Rows of (batch, length, heads, head_dim) memory lie a power of two apart as a rule, and
// then share so few cache sets that a product reads them from L2 again and again: copying them once costs less.
ATTENTION_INLINE bool is_dense(const Source& from, int64_t columns) {
  return from.stride_col == 1 && from.stride_row == columns;
}

// Rows ready to be broadcast from, or to be read by vectors where C does not pair. The first `pair_padding` rows (0 or
// 1, where C pairs) only complete a pair: they are 0, whatever the tensor holds.
template <class C>
Matrix<const typename C::Element> rows_of(const Source& from, int64_t rows, int64_t padded_rows, int64_t columns,
                                          typename C::Element* buffer, int64_t pair_padding = 0) {
  using T = typename C::Scalar;
  if constexpr (C::kPair == 1) {
    if (stored_as<T>(from.dtype) && is_dense(from, columns) && rows == padded_rows && columns % kLanes<T> == 0) {
      return {reinterpret_cast<const T*>(from.data), from.stride_row};
    }
    const Matrix<T> to{buffer, round_up(columns, kLanes<T>)};
    copy_rows(from, rows, padded_rows, columns, to);
    return {to.data, to.stride};
  } else {
    return C::paired_rows(from, rows, padded_rows, columns, buffer, pair_padding);
  }
}

// B operand whose depth runs over rows: the rows themselves, or C's pairs of neighbouring rows side by side.
template <class C>
Matrix<const typename C::Element> lanes_of(Matrix<const typename C::Element> rows, int64_t padded_rows, int64_t columns,
                                           typename C::Element* buffer) {
  if constexpr (C::kPair == 1) {
    return rows;
  } else {
    return C::interleaved_rows(rows, padded_rows, columns, buffer);
  }
}

// B operand whose depth runs over columns: (depth, rows), from `count` rows. Those that fill the last of the vectors
// are 0.
template <class C>
void transpose_rows(Matrix<const typename C::Element> rows, int64_t count, int64_t vectors, int64_t depth,
                    Matrix<typename C::Element> to) {
  using Element = typename C::Element;
  constexpr int kSide = kLanes<Element>;
  for (int64_t r = 0; r < vectors * kSide; r += kSide) {
    for (int64_t c = 0; c < depth; c += kSide) {
      Vec<Element> block[kSide];
      if (r + kSide <= count) {
        unroll<kSide>(UNROLLED(i) { block[i] = load(rows.row(r + i) + c); });
      } else {
        unroll<kSide>(UNROLLED(i) { block[i] = r + i < count ? load(rows.row(r + i) + c) : Vec<Element>{}; });
      }
      transpose(block);
      unroll<kSide>(UNROLLED(i) { store(to.row(c + i) + r, block[i]); });
    }
  }
}

// Weights (key, query) as an A operand whose depth runs over keys.
template <class C>
Matrix<const typename C::Element> weights_by_keys(Matrix<typename C::Scalar> weight, int64_t keys, int64_t vectors,
                                                  typename C::Element* buffer) {
  if constexpr (C::kPair == 1) {
    return as_operand(weight);
  } else {
    return C::paired_keys(weight, keys, vectors, buffer);
  }
}

// The same, as an A operand whose depth runs over queries.
template <class C>
Matrix<const typename C::Element> weights_by_queries(Matrix<typename C::Scalar> weight, int64_t keys, int64_t vectors,
                                                     typename C::Element* buffer) {
  if constexpr (C::kPair == 1) {
    return as_operand(weight);
  } else {
    return C::paired_queries(weight, keys, vectors, buffer);
  }
}

// Products come in even rows: the row after an odd number of keys must not count.
template <class T>
void clear_spare_row(Matrix<T> m, int64_t rows, int64_t vectors) {
  if (rows % 2 == 0) return;
  clear_lanes(m.row(rows), vectors * kLanes<T>);
}

template <class T>
void clear_block(Matrix<T> m, int64_t rows, int64_t vectors) {
  for (int64_t r = 0; r < rows; ++r) clear_lanes(m.row(r), vectors * kLanes<T>);
}

// m *= factor, element by element
template <class T>
void multiply_elements(Matrix<T> factor, Matrix<T> m, int64_t rows, int64_t vectors) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>) {
      store(m.row(r) + lane, load(m.row(r) + lane) * load(factor.row(r) + lane));
    }
  }
}

template <class T>
void copy_block(Matrix<T> from, Matrix<T> to, int64_t rows, int64_t vectors) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>) {
      store(to.row(r) + lane, load(from.row(r) + lane));
    }
  }
}

// Rows of the accumulate type, each times its factor, into a tensor. With factor_step 0 they share one.
template <class T>
void write_rows(const Source& to, int64_t rows, int64_t columns, Matrix<const T> from, const T* factor,
                int64_t factor_step = 1) {
  with_storage<T>(to.dtype, [&](auto* storage) __attribute__((always_inline)) {
    auto* data = reinterpret_cast<decltype(storage)>(const_cast<char*>(to.data));
    for (int64_t r = 0; r < rows; ++r) {
      auto* row = data + r * to.stride_row;
      const Vec<T> scale = broadcast(factor + r * factor_step);
      for_each_vector_of_row<T>(columns, [&](int64_t c, auto count) __attribute__((always_inline)) {
        __builtin_prefetch(row + kRowsAhead * to.stride_row + c * to.stride_col, 1);
        store_strided<T>(row + c * to.stride_col, to.stride_col, load(from.row(r) + c) * scale, count);
      });
    }
  });
}

template <class T>
void clear_rows(const Source& to, int64_t rows, int64_t columns) {
  with_storage<T>(to.dtype, [&](auto* storage) __attribute__((always_inline)) {
    auto* data = reinterpret_cast<decltype(storage)>(const_cast<char*>(to.data));
    for (int64_t r = 0; r < rows; ++r) {
      for_each_vector_of_row<T>(columns, [&](int64_t c, auto count) __attribute__((always_inline)) {
        store_strided<T>(data + r * to.stride_row + c * to.stride_col, to.stride_col, Vec<T>{}, count);
      });
    }
  });
}

// A run of memory handed out piece by piece; on a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace attention_ext
