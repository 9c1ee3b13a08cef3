// The two products of every pass, by one warp for its rows.
#pragma once

#include "gpu/kernels/compute.h"

namespace attention_ext {
namespace {

// Calls f(n, i) for the numbers of a row of fragments; i / 2 is the row, i % 2 the column.
template <int kTiles, class F>
ATTENTION_DEVICE void for_each_number(F&& f) {
  ATTENTION_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    ATTENTION_UNROLL
    for (int i = 0; i < 4; ++i) f(n, i);
  }
}

// The same for rows of fragments: f(m, n, i).
template <int kRowTiles, int kTiles, class F>
ATTENTION_DEVICE void for_each_number(F&& f) {
  ATTENTION_UNROLL
  for (int m = 0; m < kRowTiles; ++m) for_each_number<kTiles>([&](int n, int i) { f(m, n, i); });
}

// kRowTiles x kTiles fragments: 16 rows each, 8 columns each.
template <class T, int kRowTiles, int kTiles>
struct Fragments {
  static constexpr int kTileCount = kTiles;
  Fragment<T> tile[kRowTiles][kTiles];

  ATTENTION_DEVICE void clear() {
    for_each_number<kRowTiles, kTiles>([&](int m, int n, int i) { tile[m][n].number[i] = T(0); });
  }
};

// Rows of operand A from a tile, as often as they are used.
template <class C, class Tile>
struct TileRows {
  using Operand = typename C::A;
  static constexpr int kColumns = Tile::kColumns, kLoads = 1;  // of a step
  const Tile& tile;
  int row;

  ATTENTION_DEVICE Operand at(int m, int column) const { return C::load_a(tile, row + m * kFragmentRows, column); }
};

// The same, read once into registers.
template <class C, int kRowTiles, int kWidth>
struct HeldRows {
  using Operand = typename C::A;
  static constexpr int kColumns = kWidth, kLoads = 0, kSteps = kWidth / C::kDepth;
  Operand rows[kRowTiles][kSteps];

  template <class Tile>
  ATTENTION_DEVICE void load(const Tile& tile, int row) {
    ATTENTION_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      ATTENTION_UNROLL
      for (int i = 0; i < kSteps; ++i) rows[m][i] = C::load_a(tile, row + m * kFragmentRows, i * C::kDepth);
    }
  }
  ATTENTION_DEVICE const Operand& at(int m, int column) const { return rows[m][column / C::kDepth]; }
};

// Unrolled as a whole, long rows would load more than registers hold, and so would shorter ones beside many sums. Two
// operands that are split as they are loaded take one chain at a time.
template <class C, class RowsA, int kSums>
constexpr int unrolled_steps() {
  if (C::kSplits && RowsA::kLoads == 2) return C::kChain;
  constexpr int kSteps = maximum(1, RowsA::kLoads) * RowsA::kColumns / C::kDepth;
  return kSteps <= C::kUnrolledSteps && kSteps * kSums < 128 ? C::kUnrolledSteps : 4;
}

// c += the products of C::kChain steps of depth, with column j of two.
template <class C>
ATTENTION_DEVICE void multiply_steps(Fragment<typename C::Scalar>& c, const typename C::A (&a)[C::kChain],
                                     const typename C::B (&b)[C::kChain][2], int j) {
  if constexpr (C::kChain == 1) {
    C::multiply(c, a[0], b[0][j]);
  } else {
    Fragment<typename C::Scalar> sum{};
    ATTENTION_UNROLL
    for (int s = 0; s < C::kChain; ++s) C::multiply(sum, a[s], b[s][j]);
    ATTENTION_UNROLL
    for (int i = 0; i < 4; ++i) c.number[i] += sum.number[i];
  }
}

// sums(m, n) += sum over columns of a[m][.] b[row_b + n][.]
template <class C, int kRowTiles, int kTiles, class Sums, class RowsA, class TileB>
ATTENTION_DEVICE void multiply_rows_into(Sums&& sums, const RowsA& a, const TileB& b, int row_b) {
  constexpr int kChain = C::kChain;
  ATTENTION_UNROLL_BY((unrolled_steps<C, RowsA, kRowTiles * kTiles>() / kChain))
  for (int depth = 0; depth < RowsA::kColumns; depth += kChain * C::kDepth) {
    typename C::A rows[kRowTiles][kChain];
    ATTENTION_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      ATTENTION_UNROLL
      for (int s = 0; s < kChain; ++s) rows[m][s] = a.at(m, depth + s * C::kDepth);
    }
    ATTENTION_UNROLL
    for (int n = 0; n < kTiles; n += 2) {
      typename C::B columns[kChain][2];
      ATTENTION_UNROLL
      for (int s = 0; s < kChain; ++s) {
        C::load_b(columns[s], b, row_b + n * kFragmentColumns, depth + s * C::kDepth);
      }
      ATTENTION_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        multiply_steps<C>(sums(m, n), rows[m], columns, 0);
        multiply_steps<C>(sums(m, n + 1), rows[m], columns, 1);
      }
    }
  }
}

template <class C, int kRowTiles, int kTiles, class RowsA, class TileB>
ATTENTION_DEVICE void multiply_rows(Fragments<typename C::Scalar, kRowTiles, kTiles>& c, const RowsA& a, const TileB& b,
                                    int row_b) {
  const auto sums = [&](int m, int n) -> auto& { return c.tile[m][n]; };
  multiply_rows_into<C, kRowTiles, kTiles>(sums, a, b, row_b);
}

// Two operands as the row tiles of one.
template <class RowsA>
struct RowsOfTwo {
  static constexpr int kColumns = RowsA::kColumns, kLoads = 2 * RowsA::kLoads;
  const RowsA &first, &second;

  ATTENTION_DEVICE typename RowsA::Operand at(int m, int column) const {
    return m == 0 ? first.at(0, column) : second.at(0, column);
  }
};

// The same of two operands with one b, each row of which is read once.
template <class C, int kTiles, class RowsA, class TileB>
ATTENTION_DEVICE void multiply_rows(Fragments<typename C::Scalar, 1, kTiles>& first, const RowsA& first_rows,
                                    Fragments<typename C::Scalar, 1, kTiles>& second, const RowsA& second_rows,
                                    const TileB& b, int row_b) {
  const auto sums = [&](int m, int n) -> auto& { return (m == 0 ? first : second).tile[0][n]; };
  multiply_rows_into<C, 2, kTiles>(sums, RowsOfTwo<RowsA>{first_rows, second_rows}, b, row_b);
}

// c[m][n] += sum over rows of weight[m][.] b[row_b + .][n]
template <class C, int kRowTiles, int kTiles, int kWeights, class TileB>
ATTENTION_DEVICE void multiply_weights(Fragments<typename C::Scalar, kRowTiles, kTiles>& c,
                                       const Fragments<typename C::Scalar, kRowTiles, kWeights>& weight, const TileB& b,
                                       int row_b) {
  constexpr int kStep = C::kDepth / kFragmentColumns, kSteps = kWeights / kStep;
  constexpr int kChain = C::kChain, kChains = kSteps / kChain;
  typename C::A rows[kChains][kRowTiles][kChain];
  ATTENTION_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    ATTENTION_UNROLL
    for (int m = 0; m < kRowTiles; ++m) rows[k / kChain][m][k % kChain] = C::narrow(weight.tile[m] + k * kStep);
  }
  ATTENTION_UNROLL
  for (int n = 0; n < kTiles; n += 2) {
    ATTENTION_UNROLL
    for (int k = 0; k < kChains; ++k) {
      typename C::B columns[kChain][2];
      ATTENTION_UNROLL
      for (int s = 0; s < kChain; ++s) {
        const int row = row_b + (k * kChain + s) * kStep * kFragmentColumns;
        C::load_b_transposed(columns[s], b, row, n * kFragmentColumns);
      }
      ATTENTION_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        multiply_steps<C>(c.tile[m][n], rows[k][m], columns, 0);
        multiply_steps<C>(c.tile[m][n + 1], rows[k][m], columns, 1);
      }
    }
  }
}

}  // namespace
}  // namespace attention_ext
