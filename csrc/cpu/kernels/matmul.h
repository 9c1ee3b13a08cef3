// The one matrix product of every pass: C[m][n] (+)= sum over depth of A[m][depth] B[depth][n], small enough for the
// cache. A is read a number at a time and broadcast, B and C by vectors; so every operand is read as it lies.
#pragma once

#include "cpu/kernels/source.h"

namespace attention_ext {
namespace {

// How a dtype is computed with. Element is what a product reads at once: one number, or a pair of 16-bit numbers that
// neighbour each other in depth.
struct FloatCompute {
  using Scalar = float;
  using Element = float;
  static constexpr int kPair = 1;
  ATTENTION_INLINE static F32 operand(const float* from) { return load(from); }
  ATTENTION_INLINE static F32 operand_everywhere(const float* from) { return broadcast(from); }
  ATTENTION_INLINE static F32 exponential(F32 x) { return exp2<float>(x); }
  ATTENTION_INLINE static F32 multiply_add(F32 a, F32 b, F32 c) { return fma(a, b, c); }
};

struct DoubleCompute {
  using Scalar = double;
  using Element = double;
  static constexpr int kPair = 1;
  ATTENTION_INLINE static F64 operand(const double* from) { return load(from); }
  ATTENTION_INLINE static F64 operand_everywhere(const double* from) { return broadcast(from); }
  ATTENTION_INLINE static F64 exponential(F64 x) { return exp2<double>(x); }
  ATTENTION_INLINE static F64 multiply_add(F64 a, F64 b, F64 c) { return fma(a, b, c); }
};

// element (row, column) at data[row * stride + column]
template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t stride = 0;
  ATTENTION_INLINE T* row(int64_t i) const { return data + i * stride; }
};

template <class T>
ATTENTION_INLINE Matrix<const T> as_operand(Matrix<T> m) {
  return {m.data, m.stride};
}

// The rows from `first` on.
template <class T>
ATTENTION_INLINE Matrix<T> rows_from(Matrix<T> m, int64_t first) {
  return {m.row(first), m.stride};
}

// The columns from `first` on.
template <class T>
ATTENTION_INLINE Matrix<T> columns_from(Matrix<T> m, int64_t first) {
  return {m.data + first, m.stride};
}

// A[m][depth] at data[m * row + depth * step]
template <class T>
struct Broadcast {
  const T* data;
  int64_t row, step;
};

template <class T>
ATTENTION_INLINE Broadcast<T> by_rows(Matrix<const T> a) {
  return {a.data, a.stride, 1};
}

template <class T>
ATTENTION_INLINE Broadcast<T> by_columns(Matrix<const T> a) {
  return {a.data, 1, a.stride};
}

enum class Start : uint8_t {
  kZero,
  kAdd,
  kScaleAndAdd
};  // what becomes of C: dropped, kept, row m multiplied by factor[m]

constexpr int kTileRows = 6;

template <class C, int kRows, int kVectors>
ATTENTION_INLINE void multiply_tile(Broadcast<typename C::Element> a, Matrix<const typename C::Element> b,
                                    int64_t depth, Matrix<typename C::Scalar> c, Start start,
                                    const typename C::Scalar* factor) {
  using T = typename C::Scalar;
  Vec<T> sum[kRows][kVectors];
  if (start == Start::kZero) {
    unroll<kRows>(UNROLLED(m) { unroll<kVectors>(UNROLLED(n) { sum[m][n] = Vec<T>{}; }); });
  } else if (start == Start::kAdd) {
    unroll<kRows>(UNROLLED(m) { unroll<kVectors>(UNROLLED(n) { sum[m][n] = load(c.row(m) + n * kLanes<T>); }); });
  } else {
    unroll<kRows>(UNROLLED(m) {
      const Vec<T> worth = broadcast(factor + m);
      unroll<kVectors>(UNROLLED(n) { sum[m][n] = load(c.row(m) + n * kLanes<T>) * worth; });
    });
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[kVectors];
    unroll<kVectors>(UNROLLED(n) { row[n] = C::operand(b.row(k) + n * kLanes<T>); });
    unroll<kRows>(UNROLLED(m) {
      const Vec<T> x = C::operand_everywhere(a.data + m * a.row + k * a.step);
      unroll<kVectors>(UNROLLED(n) { sum[m][n] = C::multiply_add(x, row[n], sum[m][n]); });
    });
  }
  unroll<kRows>(UNROLLED(m) { unroll<kVectors>(UNROLLED(n) { store(c.row(m) + n * kLanes<T>, sum[m][n]); }); });
}

// rows: even; at the end a tile of 4 or 2. All tiles of one column strip run before the next strip, so that it stays in
// cache.
template <class C, int kVectors>
void multiply_strip(Broadcast<typename C::Element> a, Matrix<const typename C::Element> b, int64_t depth,
                    Matrix<typename C::Scalar> c, int64_t rows, Start start, RowsAhead& ahead,
                    const typename C::Scalar* factor) {
  for (int64_t m = 0; m < rows; m += kTileRows) {
    ahead.step();
    const Broadcast<typename C::Element> a_tile{a.data + m * a.row, a.row, a.step};
    const Matrix<typename C::Scalar> c_tile{c.row(m), c.stride};
    const auto* f = factor ? factor + m : nullptr;
    switch (rows - m) {
      case 2:
        multiply_tile<C, 2, kVectors>(a_tile, b, depth, c_tile, start, f);
        break;
      case 4:
        multiply_tile<C, 4, kVectors>(a_tile, b, depth, c_tile, start, f);
        break;
      default:
        multiply_tile<C, kTileRows, kVectors>(a_tile, b, depth, c_tile, start, f);
    }
  }
}

// depth counts elements; columns are vectors of the scalar. ahead: rows that are needed next.
template <class C>
void multiply(Broadcast<typename C::Element> a, Matrix<const typename C::Element> b, int64_t depth,
              Matrix<typename C::Scalar> c, int64_t rows, int64_t vectors, Start start, RowsAhead ahead = {},
              const typename C::Scalar* factor = nullptr) {
  const int64_t strips = ceil_div(vectors, kTileVectors);
  ahead = ahead.in_steps(strips * ceil_div(rows, kTileRows));
  for (int64_t strip = 0, first = 0; strip < strips; ++strip) {
    const int64_t width =
        (vectors - first) / (strips - strip) + ((vectors - first) % (strips - strip) != 0);  // even widths
    const Matrix<const typename C::Element> b_strip{b.data + first * kLanes<typename C::Scalar>, b.stride};
    const Matrix<typename C::Scalar> c_strip{c.data + first * kLanes<typename C::Scalar>, c.stride};
    unroll<kTileVectors>(UNROLLED(n) {
      if (width == n + 1) multiply_strip<C, n + 1>(a, b_strip, depth, c_strip, rows, start, ahead, factor);
    });
    first += width;
  }
}

}  // namespace
}  // namespace attention_ext
