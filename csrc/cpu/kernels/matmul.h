// The one matrix product of every pass: C[m][n] (+)= sum over depth of A[m][depth] B[depth][n], small enough for the
// cache. A is read a number at a time and broadcast, B and C by vectors; so every operand is read as it lies.
#pragma once

#include "cpu/kernels/source.h"

namespace attention_ext {
namespace {

// The arithmetic of a dtype. Element is the unit that a product reads: one Number, or a pair of 16-bit ones that
// neighbour each other in depth.
struct FloatCompute {
  using Scalar = float;
  using Element = float;
  using Number = float;
  static constexpr int kPair = 1;
  ATTENTION_INLINE static F32 operand(const float* from) { return load(from); }
  ATTENTION_INLINE static F32 operand_everywhere(const float* from) { return broadcast(from); }
  ATTENTION_INLINE static F32 exponential(F32 x) { return exp2<float>(x); }
  ATTENTION_INLINE static F32 multiply_add(F32 a, F32 b, F32 c) { return fma(a, b, c); }
};

struct DoubleCompute {
  using Scalar = double;
  using Element = double;
  using Number = double;
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

// A operands. Whether rows or depth neighbour each other in memory is part of the type: a tile then reads all its rows
// through one pointer, or through one index.
template <class T>
struct ByRows {
  Matrix<const T> a;
  ATTENTION_INLINE const T* at(int64_t m, int64_t depth) const { return a.row(m) + depth; }
  ATTENTION_INLINE ByRows from(int64_t m, int64_t depth) const { return {{at(m, depth), a.stride}}; }
};

template <class T>
struct ByColumns {
  Matrix<const T> a;
  ATTENTION_INLINE const T* at(int64_t m, int64_t depth) const { return a.row(depth) + m; }
  ATTENTION_INLINE ByColumns from(int64_t m, int64_t depth) const { return {{at(m, depth), a.stride}}; }
};

template <class T>
ATTENTION_INLINE ByRows<T> by_rows(Matrix<const T> a) {
  return {a};
}

template <class T>
ATTENTION_INLINE ByColumns<T> by_columns(Matrix<const T> a) {
  return {a};
}

enum class Start : uint8_t {
  kZero,
  kAdd,
  kScaleAndAdd
};  // C is overwritten, added to, or added to after row m is multiplied by factor[m]

// 6 x 4 sums take 24 of 32 registers (6 x 2, 12 of 16). Narrower tiles are taller, as some cores load but one whole
// vector a cycle and multiply two; 8 rows leave no rest of 64 queries or 192 keys.
constexpr int kTileRows = 6, kNarrowTileRows = 8;
template <int kVectors>
constexpr int kRowsOf = kVectors == kTileVectors ? kTileRows : kNarrowTileRows;

// Depth that a strip runs through at once, so that both operands stay in L1 from tile to tile: of 192 keys, half.
constexpr int64_t kDepthTogether = 128;

template <class C, int kRows, int kVectors, class A>
ATTENTION_INLINE void multiply_tile(A a, Matrix<const typename C::Element> b, int64_t depth,
                                    Matrix<typename C::Scalar> c, Start start, const typename C::Scalar* factor) {
  using T = typename C::Scalar;
  Vec<T> sum[kRows][kVectors];
  if (start == Start::kZero) {
    unroll<kRows>(UNROLLED(m) { unroll<kVectors>(UNROLLED(n) { sum[m][n] = Vec<T>{}; }); });
  } else if (start == Start::kAdd) {
    unroll<kRows>(UNROLLED(m) { unroll<kVectors>(UNROLLED(n) { sum[m][n] = load(c.row(m) + n * kLanes<T>); }); });
  } else {
    unroll<kRows>(UNROLLED(m) {
      const Vec<T> scale = broadcast(factor + m);
      unroll<kVectors>(UNROLLED(n) { sum[m][n] = load(c.row(m) + n * kLanes<T>) * scale; });
    });
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[kVectors];
    unroll<kVectors>(UNROLLED(n) { row[n] = C::operand(b.row(k) + n * kLanes<T>); });
    unroll<kRows>(UNROLLED(m) {
      const Vec<T> x = C::operand_everywhere(a.at(m, k));
      unroll<kVectors>(UNROLLED(n) { sum[m][n] = C::multiply_add(x, row[n], sum[m][n]); });
    });
  }
  unroll<kRows>(UNROLLED(m) { unroll<kVectors>(UNROLLED(n) { store(c.row(m) + n * kLanes<T>, sum[m][n]); }); });
}

// rows: even. Tiles of 4 and 2 rows cover the remainder.
template <class C, int kVectors, class A>
void multiply_strip(A a, Matrix<const typename C::Element> b, int64_t depth, Matrix<typename C::Scalar> c, int64_t rows,
                    Start start, RowsAhead& ahead, const typename C::Scalar* factor) {
  int64_t m = 0;
  const auto tiles_of = [&](auto count) __attribute__((always_inline)) {
    for (; m + count <= rows; m += count) {
      ahead.step();
      multiply_tile<C, count, kVectors>(a.from(m, 0), b, depth, rows_from(c, m), start, factor ? factor + m : nullptr);
    }
  };
  tiles_of(std::integral_constant<int, kRowsOf<kVectors>>{});
  tiles_of(std::integral_constant<int, 4>{});
  tiles_of(std::integral_constant<int, 2>{});
}

// The first share where n is dealt out evenly. Mostly there is but one, which spares a division.
ATTENTION_INLINE int64_t first_share(int64_t n, int64_t shares) { return shares == 1 ? n : ceil_div(n, shares); }

// depth counts elements; columns are vectors of the scalar. ahead: rows that are needed next. A strip of columns and a
// part of the depth run through all tiles before the next, so that they stay in cache.
template <class C, class A>
void multiply(A a, Matrix<const typename C::Element> b, int64_t depth, Matrix<typename C::Scalar> c, int64_t rows,
              int64_t vectors, Start start, RowsAhead ahead = {}, const typename C::Scalar* factor = nullptr) {
  const int64_t strips = ceil_div(vectors, kTileVectors), parts = maximum<int64_t>(ceil_div(depth, kDepthTogether), 1);
  ahead = ahead.in_steps(strips * parts * ceil_div(rows, kNarrowTileRows));
  for (int64_t strip = 0, first = 0; strip < strips; ++strip) {
    const int64_t width = first_share(vectors - first, strips - strip);
    const Matrix<typename C::Scalar> c_strip = columns_from(c, first * kLanes<typename C::Scalar>);
    for (int64_t part = 0, k = 0; part < parts; ++part) {
      const int64_t count = first_share(depth - k, parts - part);
      const auto b_part = columns_from(rows_from(b, k), first * kLanes<typename C::Scalar>);
      const Start now = part == 0 ? start : Start::kAdd;
      unroll<kTileVectors>(UNROLLED(n) {
        if (width == n + 1) multiply_strip<C, n + 1>(a.from(0, k), b_part, count, c_strip, rows, now, ahead, factor);
      });
      k += count;
    }
    first += width;
  }
}

}  // namespace
}  // namespace attention_ext
