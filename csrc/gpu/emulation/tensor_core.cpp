#include "gpu/emulation/tensor_core.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/numeric.h"

namespace attention_ext::emulation {

namespace {

constexpr int kColumns = Operands<float>::kColumns;
constexpr int kFractionBits = 23, kLeastExponent = -126;  // of a float
constexpr int kExponentOfZero = -1000;                    // far below all others

template <class T>
T bits_as(auto bits) {
  return __builtin_bit_cast(T, bits);
}

int exponent_of(float x, int least) {
  if (x == 0) return kExponentOfZero;
  return maximum(static_cast<int>(bits_as<uint32_t>(x) >> kFractionBits & 0xFF) - 127, least);
}

double power_of_2(int exponent) { return bits_as<double>(static_cast<uint64_t>(exponent + 1023) << 52); }

// Towards zero.
float cut_off(double x) {
  if (std::abs(x) < power_of_2(kLeastExponent)) {
    const double unit = power_of_2(kLeastExponent - kFractionBits);
    return static_cast<float>(std::trunc(x / unit) * unit);
  }
  constexpr int kDroppedBits = 52 - kFractionBits;
  return static_cast<float>(bits_as<double>(bits_as<uint64_t>(x) >> kDroppedBits << kDroppedBits));
}

template <class F>
void for_each(const OperandType& type, Operands<float>& x, F&& f) {
  for (int m = 0; m < type.rows; ++m) {
    for (int k = 0; k < type.depth; ++k) f(x.a[m][k]);
    for (int n = 0; n < kColumns; ++n) f(x.c[m][n]);
  }
  for (int k = 0; k < type.depth; ++k) {
    for (int n = 0; n < kColumns; ++n) f(x.b[k][n]);
  }
}

void round_to_nearest(const OperandType& type, Operands<float>& x) {
  for (int m = 0; m < type.rows; ++m) {
    for (int k = 0; k < type.depth; ++k) {
      for (int n = 0; n < kColumns; ++n) x.c[m][n] += x.a[m][k] * x.b[k][n];
    }
  }
}

struct Exponents {
  int a[Operands<float>::kMostRows][Operands<float>::kMostDepth], b[Operands<float>::kMostDepth][kColumns];

  Exponents(const OperandType& type, const Operands<float>& x) {
    for (int k = 0; k < type.depth; ++k) {
      for (int m = 0; m < type.rows; ++m) a[m][k] = exponent_of(x.a[m][k], type.least_exponent);
      for (int n = 0; n < kColumns; ++n) b[k][n] = exponent_of(x.b[k][n], type.least_exponent);
    }
  }
};

// The terms from `first` on to a row of C.
void add_block(const Exponents& exponents, Operands<float>& x, int m, int first, int terms, int extra_bits) {
  int largest[kColumns];
  double unit[kColumns], per_unit[kColumns], sum[kColumns];  // a sum of whole units
  for (int n = 0; n < kColumns; ++n) largest[n] = exponent_of(x.c[m][n], kLeastExponent);
  for (int k = first; k < first + terms; ++k) {
    for (int n = 0; n < kColumns; ++n) largest[n] = maximum(largest[n], exponents.a[m][k] + exponents.b[k][n]);
  }
  for (int n = 0; n < kColumns; ++n) {
    const int last_bit = maximum(largest[n], 2 * kLeastExponent) - kFractionBits - extra_bits;
    unit[n] = power_of_2(last_bit);
    per_unit[n] = power_of_2(-last_bit);
    sum[n] = static_cast<int>(static_cast<double>(x.c[m][n]) * per_unit[n]);
  }
  for (int k = first; k < first + terms; ++k) {
    const double a = x.a[m][k];
    for (int n = 0; n < kColumns; ++n) sum[n] += static_cast<int>(a * static_cast<double>(x.b[k][n]) * per_unit[n]);
  }
  for (int n = 0; n < kColumns; ++n) x.c[m][n] = cut_off(sum[n] * unit[n]);
}

void cut_off_blocks(const TensorCore& core, const OperandType& type, Operands<float>& x) {
  const Exponents exponents(type, x);
  const int terms = minimum(core.block_bytes / type.bytes, type.depth);
  for (int m = 0; m < type.rows; ++m) {
    for (int first = 0; first < type.depth; first += terms) {
      add_block(exponents, x, m, first, terms, core.extra_bits);
    }
  }
}

}  // namespace

TensorCore TensorCore::named(const char* name) {
  if (std::strcmp(name, "sm_80") == 0) return kSm80;
  if (std::strcmp(name, "sm_90") == 0) return kSm90;
  if (std::strcmp(name, "nearest") == 0) return kNearest;
  throw std::invalid_argument(std::string("attention_ext: emulated tensor cores are sm_80, sm_90 or nearest, got ") +
                              name);
}

void multiply(const TensorCore& core, const OperandType& type, Operands<float>& x) {
  if (core.block_bytes == 0) return round_to_nearest(type, x);
  float zero = 0;  // NaN as soon as one number is not finite
  for_each(type, x, [&](float number) { zero += number * 0; });
  if (zero == 0) return cut_off_blocks(core, type, x);
  // Infinities and NaNs come out of any sum, and only of those that they are in.
  Operands<float> plain = x;
  round_to_nearest(type, plain);
  for_each(type, x, [](float& number) { number = std::isfinite(number) ? number : 0; });
  cut_off_blocks(core, type, x);
  for (int m = 0; m < type.rows; ++m) {
    for (int n = 0; n < kColumns; ++n) {
      if (!std::isfinite(plain.c[m][n])) x.c[m][n] = plain.c[m][n];
    }
  }
}

void multiply(const TensorCore&, const OperandType& type, Operands<double>& x) {
  for (int m = 0; m < type.rows; ++m) {
    for (int k = 0; k < type.depth; ++k) {
      for (int n = 0; n < kColumns; ++n) x.c[m][n] = std::fma(x.a[m][k], x.b[k][n], x.c[m][n]);
    }
  }
}

}  // namespace attention_ext::emulation
