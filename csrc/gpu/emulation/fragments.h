// Warp-wide matrix instructions with the fragment layouts of the PTX manual: lane = 4 * group + member.
#pragma once

#include <cstring>
#include <type_traits>

#include "gpu/emulation/block.h"
#include "gpu/emulation/numbers.h"
#include "gpu/emulation/tensor_core.h"

namespace attention_ext::emulation {

// Where number i of a lane's fragment lies.
struct Place {
  int row, column;
};

template <class E>
struct Shape16x8x16 {
  static constexpr const char* kName = "mma.m16n8k16";
  static constexpr OperandType kType{16, 16, sizeof(E), std::is_same_v<E, Half> ? -14 : -126};
  using Register = uint32_t;
  using Number = float;
  static constexpr int kA = 4, kB = 2, kC = 4, kNumbersPerRegister = 2;
  static Place a(int group, int member, int i) { return {group + i / 2 % 2 * 8, member * 2 + i % 2 + i / 4 * 8}; }
  static Place b(int group, int member, int i) { return {member * 2 + i % 2 + i / 2 * 8, group}; }
  static Place c(int group, int member, int i) { return {group + i / 2 * 8, member * 2 + i % 2}; }
  static float number(uint32_t pair, int i) { return widen(E{static_cast<uint16_t>(pair >> (i * 16))}); }
};

// Of double, or of tf32 numbers as uint32_t.
template <class R>
struct Shape16x8x8 {
  static constexpr const char* kName = "mma.m16n8k8";
  using Register = R;
  using Number = std::conditional_t<sizeof(R) == 8, double, float>;
  static constexpr OperandType kType{16, 8, sizeof(R), sizeof(R) == 8 ? -1022 : -126};
  static constexpr int kA = 4, kB = 2, kC = 4, kNumbersPerRegister = 1;
  static Place a(int group, int member, int i) { return {group + i % 2 * 8, member + i / 2 * 4}; }
  static Place b(int group, int member, int i) { return {member + i * 4, group}; }
  static Place c(int group, int member, int i) { return {group + i / 2 * 8, member * 2 + i % 2}; }
  static float number(uint32_t bits, int) { return __builtin_bit_cast(float, bits & ~0x1FFFu); }
  static double number(double x, int) { return x; }
};

struct Shape8x8x4 {
  static constexpr const char* kName = "mma.m8n8k4";
  static constexpr OperandType kType{8, 4, sizeof(double), -1022};
  using Register = double;
  using Number = double;
  static constexpr int kA = 1, kB = 1, kC = 2, kNumbersPerRegister = 1;
  static Place a(int group, int member, int) { return {group, member}; }
  static Place b(int group, int member, int) { return {member, group}; }
  static Place c(int group, int member, int i) { return {group, member * 2 + i}; }
  static double number(double x, int) { return x; }
};

template <class Shape>
void multiply(typename Shape::Number (&c)[Shape::kC], const typename Shape::Register (&a)[Shape::kA],
              const typename Shape::Register (&b)[Shape::kB]) {
  using Number = typename Shape::Number;
  struct Argument {
    Number* c;
    const typename Shape::Register *a, *b;
  } argument{c, a, b};
  current->collective(Shape::kName, &argument, [](void* const* lanes) {
    constexpr int kPacked = Shape::kNumbersPerRegister;
    Operands<Number> x;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const auto* from = static_cast<const Argument*>(lanes[lane]);
      const int group = lane / 4, member = lane % 4;
      for (int i = 0; i < Shape::kA * kPacked; ++i) {
        const Place at = Shape::a(group, member, i);
        x.a[at.row][at.column] = Shape::number(from->a[i / kPacked], i % kPacked);
      }
      for (int i = 0; i < Shape::kB * kPacked; ++i) {
        const Place at = Shape::b(group, member, i);
        x.b[at.row][at.column] = Shape::number(from->b[i / kPacked], i % kPacked);
      }
      for (int i = 0; i < Shape::kC; ++i) {
        const Place at = Shape::c(group, member, i);
        x.c[at.row][at.column] = from->c[i];
      }
    }
    multiply(current->tensor_core(), Shape::kType, x);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const auto* to = static_cast<const Argument*>(lanes[lane]);
      for (int i = 0; i < Shape::kC; ++i) {
        const Place at = Shape::c(lane / 4, lane % 4, i);
        to->c[i] = x.c[at.row][at.column];
      }
    }
  });
}

// ldmatrix.x4: lane 8 i + j names row j of matrix i; a lane receives two neighbours of each matrix.
template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const void* row) {
  struct Argument {
    uint32_t* to;
    const void* row;
  } argument{to, row};
  current->read_shared("ldmatrix", row, 16, AccessLog::kWholeWarp);
  current->collective(kTransposed ? "ldmatrix.trans" : "ldmatrix", &argument, [](void* const* lanes) {
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      for (int j = 0; j < 8; ++j) std::memcpy(matrix[j], static_cast<Argument*>(lanes[8 * i + j])->row, 16);
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const int group = lane / 4, first = lane % 4 * 2;
        const uint16_t low = kTransposed ? matrix[first][group] : matrix[group][first];
        const uint16_t high = kTransposed ? matrix[first + 1][group] : matrix[group][first + 1];
        static_cast<Argument*>(lanes[lane])->to[i] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

}  // namespace attention_ext::emulation
