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
ATTENTION_DEVICE void exchange(uint32_t& first, uint32_t& second, int bit) {
  const bool upper = (lane_index() & bit) != 0;
  const uint32_t received = shuffle_xor(upper ? first : second, bit);
  first = upper ? received : first;
  second = upper ? second : received;
}

// Word i of the group's lane j becomes word j of its lane i.
ATTENTION_DEVICE void transpose_in_group(uint32_t (&word)[4]) {
  exchange(word[0], word[1], 1);
  exchange(word[2], word[3], 1);
  exchange(word[0], word[2], 2);
  exchange(word[1], word[3], 2);
}

// Operand A has 16 rows, operand B comes for two fragments of C at once.
template <class E>
struct Compute16 {
  using Element = E;
  using Scalar = float;
  static constexpr int kDepth = 16, kUnrolledSteps = 8;
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

// Of float and double, operands are read a pair at a time from rows or a number at a time from columns.
template <class T, class Operand>
struct ComputeWide {
  using Element = T;
  using Scalar = T;
  static constexpr int kDepth = 8, kUnrolledSteps = 4;
  struct A {
    Operand number[4];  // as in Fragment
  };
  struct B {
    Operand number[2];
  };

  template <class Tile>
  ATTENTION_DEVICE static A load_a(const Tile& tile, int row, int column) {
    A a;
    for (int i = 0; i < 2; ++i) {
      const T* pair = tile.at(row + i * 8 + lane_group(), column + 2 * lane_member());
      a.number[2 * i] = Operand(load_shared(pair));
      a.number[2 * i + 1] = Operand(load_shared(pair + 1));
    }
    return a;
  }
  template <class Tile>
  ATTENTION_DEVICE static void load_b(B (&b)[2], const Tile& tile, int row, int column) {
    for (int i = 0; i < 2; ++i) {
      const T* pair = tile.at(row + i * 8 + lane_group(), column + 2 * lane_member());
      b[i] = {Operand(load_shared(pair)), Operand(load_shared(pair + 1))};
    }
  }
  template <class Tile>
  ATTENTION_DEVICE static void load_b_transposed(B (&b)[2], const Tile& tile, int row, int column) {
    for (int i = 0; i < 2; ++i) {
      const int depth = row + 2 * lane_member(), n = column + i * 8 + lane_group();
      b[i] = {Operand(load_shared(tile.at(depth, n))), Operand(load_shared(tile.at(depth + 1, n)))};
    }
  }
  ATTENTION_DEVICE static A narrow(const Fragment<T>* c) {
    A a;
    for (int i = 0; i < 4; ++i) a.number[i] = Operand(c->number[i]);
    return a;
  }
};

// A float as the sum of two tf32 numbers. An infinity or a NaN is the small one: so it meets only the other side's big
// part, which has its sign, and stays infinite or NaN.
struct SplitFloat {
  uint32_t big, small;
  SplitFloat() = default;
  ATTENTION_DEVICE explicit SplitFloat(float x) {
    const uint32_t nearest = nearest_tf32(x);
    const float rest = x - float_of(nearest);
    const bool finite = rest - rest == 0.0f;
    big = finite ? nearest : 0;
    small = finite ? nearest_tf32(rest) : bits_of(x);
  }

 private:
  // round_to_tf32 in two instructions in place of five, for all but NaN.
  ATTENTION_DEVICE static uint32_t nearest_tf32(float x) { return (bits_of(x) + 0x1000u) & ~0x1fffu; }
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
    const uint32_t big_a[4] = {a.number[0].big, a.number[2].big, a.number[1].big, a.number[3].big};
    const uint32_t small_a[4] = {a.number[0].small, a.number[2].small, a.number[1].small, a.number[3].small};
    const uint32_t big_b[2] = {b.number[0].big, b.number[1].big};
    const uint32_t small_b[2] = {b.number[0].small, b.number[1].small};
    float sum[4] = {};
    multiply_16x8x8(sum, small_a, big_b);
    multiply_16x8x8(sum, big_a, small_b);
    multiply_16x8x8(sum, big_a, big_b);
    for (int i = 0; i < 4; ++i) c.number[i] += sum[i];
  }
};

struct ComputeDouble : ComputeWide<double, double> {
  ATTENTION_DEVICE static void multiply(Fragment<double>& c, const A& a, const B& b) {
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 2; ++half) {
        multiply_8x8x4(c.number[2 * half], c.number[2 * half + 1], a.number[2 * half + i], b.number[i]);
      }
    }
  }
};

}  // namespace
}  // namespace attention_ext
