// How a dtype is multiplied: C (16 x 8) += A (16 x depth) B (depth x 8) by one warp.
//
// A lane = 4 * group + member holds of C rows group and group + 8, columns 2 * member and 2 * member + 1; and of A and
// B the same neighbours along depth. Where an instruction wants other places along depth, A and B are permuted alike:
// so a fragment of C, narrowed, is a fragment of A for the next product.
#pragma once

#include "gpu/kernels/shared_tile.h"

namespace attention_ext {
namespace {

ATTENTION_DEVICE int lane_index() { return thread_index() % kWarpSize; }
ATTENTION_DEVICE int lane_group() { return lane_index() / 4; }
ATTENTION_DEVICE int lane_member() { return lane_index() % 4; }
ATTENTION_DEVICE int reread_lane_index() { return reread_thread_index() % kWarpSize; }

template <class T>
ATTENTION_DEVICE constexpr T infinity() {
  return static_cast<T>(__builtin_inf());
}

constexpr int kFragmentRows = 16, kFragmentColumns = 8;

template <class T>
struct Fragment {
  T number[4];  // (row group: two columns), (row group + 8: two columns)
};

template <class E, class T>
ATTENTION_DEVICE E rounded(T x) {
  if constexpr (sizeof(E) == sizeof(T)) {
    return x;
  } else {
    return {static_cast<uint16_t>(narrow_pair(E{}, x, T(0)))};
  }
}

// Between lanes whose indices differ in one bit: the second word of the lower one for the first of the upper one.
ATTENTION_DEVICE void exchange(uint32_t& first, uint32_t& second, int bit, int lane = lane_index()) {
  const bool upper = (lane & bit) != 0;
  const uint32_t received = shuffle_xor(upper ? first : second, bit);
  first = upper ? received : first;
  second = upper ? second : received;
}

// Word i of the group's lane j becomes word j of its lane i.
ATTENTION_DEVICE void transpose_in_group(uint32_t (&word)[4], int lane = lane_index()) {
  exchange(word[0], word[1], 1, lane);
  exchange(word[2], word[3], 1, lane);
  exchange(word[0], word[2], 2, lane);
  exchange(word[1], word[3], 2, lane);
}

// Operand A has 16 rows, operand B comes for two fragments of C at once.
template <class E>
struct Compute16 {
  using Element = E;
  using Scalar = float;
  static constexpr int kDepth = 16, kUnrolledSteps = 8;
  static constexpr bool kSplits = false;  // numbers, each into several
  static constexpr int kChain = 1;        // steps of depth whose sum is made apart before it is added to C, if several
  struct A {
    uint32_t pair[4];
  };
  struct B {
    uint32_t pair[2];
  };

  template <class Tile>
  ATTENTION_DEVICE static A load_a(const Tile& tile, int row, int column) {
    A a;
    const int lane = lane_index();
    load_matrices(a.pair, tile.chunk_at(row, lane % 16, column, lane / 16));
    return a;
  }
  // B[depth][n] = tile[row + n][column + depth]
  template <class Tile>
  ATTENTION_DEVICE static void load_b(B (&b)[2], const Tile& tile, int row, int column) {
    uint32_t pair[4];
    const int lane = lane_index();
    load_matrices(pair, tile.chunk_at(row, lane / 16 * 8 + lane % 8, column, lane / 8 % 2));
    b[0] = {pair[0], pair[1]};
    b[1] = {pair[2], pair[3]};
  }
  // B[depth][n] = tile[row + depth][column + n]
  template <class Tile>
  ATTENTION_DEVICE static void load_b_transposed(B (&b)[2], const Tile& tile, int row, int column) {
    uint32_t pair[4];
    const int lane = lane_index();
    load_matrices_transposed(pair, tile.chunk_at(row, lane % 16, column, lane / 16));
    b[0] = {pair[0], pair[1]};
    b[1] = {pair[2], pair[3]};
  }
  ATTENTION_DEVICE static A narrow(const Fragment<float>* c) {
    A a;
    for (int i = 0; i < 4; ++i) {
      const float* pair = c[i / 2].number + i % 2 * 2;
      a.pair[i] = narrow_pair(E{}, pair[0], pair[1]);
    }
    return a;
  }
  ATTENTION_DEVICE static void multiply(Fragment<float>& c, const A& a, const B& b) {
    multiply_16x8x16(E{}, c.number, a.pair, b.pair);
  }
};

// A float as the sum of two tf32 numbers: the nearest one, and the rest, whose bits are few enough.
struct SplitFloat {
  float big, rest;
  SplitFloat() = default;
  ATTENTION_DEVICE SplitFloat(float big_part, float rest_part) : big(big_part), rest(rest_part) {}

  // An infinity or a NaN is the rest: so it meets only the other side's big part, which has its sign, and stays
  // infinite or NaN.
  ATTENTION_DEVICE explicit SplitFloat(float x) {
    big = __builtin_fabsf(nearest(x)) < infinity<float>() ? nearest(x) : 0.0f;
    rest = x - big;
  }
  // In two instructions less; an infinity becomes NaN.
  ATTENTION_DEVICE static SplitFloat of_finite(float x) { return {nearest(x), x - nearest(x)}; }

 private:
  // round_to_tf32 in two instructions in place of five, for all but NaN.
  ATTENTION_DEVICE static float nearest(float x) { return float_of((bits_of(x) + 0x1000u) & ~0x1fffu); }
};

// The two parts of a tile of float32 (SplitFloat).
template <class Tile>
struct SplitTile {
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;
  static constexpr size_t kBytes = 2 * Tile::kBytes;
  using Part = Tile;
  Tile big, rest;

  ATTENTION_DEVICE static SplitTile in(char* memory) { return {Tile::in(memory), Tile::in(memory + Tile::kBytes)}; }
};

// Of float and double, operands are read a pair at a time from rows or a number at a time from columns.
template <class T, class Operand>
struct ComputeWide {
  using Element = T;
  using Scalar = T;
  static constexpr int kDepth = 8, kUnrolledSteps = 4;
  static constexpr bool kSplits = sizeof(Operand) > sizeof(T);
  static constexpr int kChain = kSplits ? 2 : 1;
  struct A {
    Operand number[4];  // as in Fragment
  };
  using B = Pair<Operand>;

  template <class Tile>
  ATTENTION_DEVICE static A load_a(const Tile& tile, int row, int column) {
    A a;
    for (int i = 0; i < 2; ++i) {
      const auto pair = load<Pair<T>>(tile, row + i * 8, lane_group(), column, 2 * lane_member());
      for (int j = 0; j < 2; ++j) a.number[2 * i + j] = of_row(pair.number[j]);
    }
    return a;
  }
  template <class Tile>
  ATTENTION_DEVICE static void load_b(B (&b)[2], const Tile& tile, int row, int column) {
    for (int i = 0; i < 2; ++i) b[i] = load_pair(tile, row + i * 8, column);
  }
  template <class Tile>
  ATTENTION_DEVICE static void load_b_transposed(B (&b)[2], const Tile& tile, int row, int column) {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) b[i].number[j] = load_of_column(tile, row, j, column + i * 8);
    }
  }
  ATTENTION_DEVICE static A narrow(const Fragment<T>* c) {
    A a;
    for (int i = 0; i < 4; ++i) a.number[i] = of_row(c->number[i]);
    return a;
  }

 private:
  // Of operand A, where an infinity may become NaN: infinite queries make their softmax NaN anyway, and infinite keys
  // and values the gradients of queries.
  ATTENTION_DEVICE static Operand of_row(T x) {
    if constexpr (kSplits) {
      return Operand::of_finite(x);
    } else {
      return Operand(x);
    }
  }

  template <class Number, class Tile>
  ATTENTION_DEVICE static Number load(const Tile& tile, int row, int lane_row, int column, int lane_column) {
    return load_shared(shared_pointer<Number>(tile.address_of(row, lane_row, column, lane_column)));
  }

  // Neighbours in the row of a lane's group.
  template <class Tile>
  ATTENTION_DEVICE static B load_pair(const Tile& tile, int row, int column) {
    const auto pair = load<Pair<T>>(tile, row, lane_group(), column, 2 * lane_member());
    return {Operand(pair.number[0]), Operand(pair.number[1])};
  }
  template <class Tile>
  ATTENTION_DEVICE static B load_pair(const SplitTile<Tile>& tile, int row, int column) {
    const auto big = load<Pair<T>>(tile.big, row, lane_group(), column, 2 * lane_member());
    const auto rest = load<Pair<T>>(tile.rest, row, lane_group(), column, 2 * lane_member());
    return {Operand(big.number[0], rest.number[0]), Operand(big.number[1], rest.number[1])};
  }

  // Number j of two neighbours in the column of a lane's group.
  template <class Tile>
  ATTENTION_DEVICE static Operand load_of_column(const Tile& tile, int row, int j, int column) {
    return Operand(load<T>(tile, row, 2 * lane_member() + j, column, lane_group()));
  }
  template <class Tile>
  ATTENTION_DEVICE static Operand load_of_column(const SplitTile<Tile>& tile, int row, int j, int column) {
    return {load<T>(tile.big, row, 2 * lane_member() + j, column, lane_group()),
            load<T>(tile.rest, row, 2 * lane_member() + j, column, lane_group())};
  }
};

// One TF32 product, as torch's own where it allows TF32.
struct RoundedFloat {
  uint32_t bits;
  RoundedFloat() = default;
  ATTENTION_DEVICE explicit RoundedFloat(float x) : bits(round_to_tf32(x)) {}
};

struct ComputeTf32 : ComputeWide<float, RoundedFloat> {
  ATTENTION_DEVICE static void multiply(Fragment<float>& c, const A& a, const B& b) {
    const uint32_t rows[4] = {a.number[0].bits, a.number[2].bits, a.number[1].bits, a.number[3].bits};
    const uint32_t columns[2] = {b.number[0].bits, b.number[1].bits};
    multiply_16x8x8(c.number, rows, columns);
  }
};

// 3xTF32: all products but that of the two rests. Tensor cores cut off what they add to C, always towards 0, and over
// many keys that adds up: so their sums begin at 0 here and are added to C rounded to nearest.
struct ComputeFloat : ComputeWide<float, SplitFloat> {
  ATTENTION_DEVICE static void multiply(Fragment<float>& c, const A& a, const B& b) {
    uint32_t big_a[4], rest_a[4], big_b[2], rest_b[2];
    for (int i = 0; i < 4; ++i) {
      big_a[i] = bits_of(a.number[i / 2 + i % 2 * 2].big);
      rest_a[i] = bits_of(a.number[i / 2 + i % 2 * 2].rest);
    }
    for (int i = 0; i < 2; ++i) {
      big_b[i] = bits_of(b.number[i].big);
      rest_b[i] = bits_of(b.number[i].rest);
    }
    multiply_16x8x8(c.number, rest_a, big_b);
    multiply_16x8x8(c.number, big_a, rest_b);
    multiply_16x8x8(c.number, big_a, big_b);
  }
};

struct ComputeDouble : ComputeWide<double, double> {
  ATTENTION_DEVICE static void multiply(Fragment<double>& c, const A& a, const B& b) {
    const double rows[4] = {a.number[0], a.number[2], a.number[1], a.number[3]};
    multiply_16x8x8(c.number, rows, b.number);
  }
};

}  // namespace
}  // namespace attention_ext
