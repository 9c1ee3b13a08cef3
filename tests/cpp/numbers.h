// Arrays of the library's dtypes, read and written as double.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "core/problem.h"
#include "guarded.h"

namespace attention_ext::test {

#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

inline DType accumulate_type(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// The distance from 1 to the next larger number.
inline double eps_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-52;
    case DType::kFloat32:
      return 0x1p-23;
    case DType::kFloat16:
      return 0x1p-10;
    default:
      return 0x1p-7;
  }
}

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    default:
      return "bool";
  }
}

inline double load_number(const void* data, DType dtype, int64_t i) {
  const auto read = [&](auto value) {
    std::memcpy(&value, static_cast<const char*>(data) + i * size_of(dtype), sizeof(value));
    return value;
  };
  switch (dtype) {
    case DType::kFloat64:
      return read(double{});
    case DType::kFloat32:
      return read(float{});
    case DType::kBool:
      return read(uint8_t{});
    case DType::kFloat16:
      return static_cast<double>(read(Half{}));
    default: {
      const uint32_t bits = static_cast<uint32_t>(read(uint16_t{})) << 16;
      float value = 0;
      std::memcpy(&value, &bits, sizeof(value));
      return value;
    }
  }
}

inline void store_number(void* data, DType dtype, int64_t i, double x) {
  const auto write = [&](auto value) {
    std::memcpy(static_cast<char*>(data) + i * size_of(dtype), &value, sizeof(value));
  };
  switch (dtype) {
    case DType::kFloat64:
      return write(x);
    case DType::kFloat32:
      return write(static_cast<float>(x));
    case DType::kBool:
      return write(static_cast<uint8_t>(x != 0));
    case DType::kFloat16:
      return write(static_cast<Half>(x));
    default: {
      const auto value = static_cast<float>(x);
      uint32_t bits = 0;
      std::memcpy(&bits, &value, sizeof(bits));
      return write(static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16));
    }
  }
}

// (batch, heads, rows, columns), with (batch, rows, heads, columns) memory where heads_last.
struct Array {
  Guarded memory;
  View view;
  int64_t sizes[4];

  Array(DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t columns, bool heads_last = false)
      : memory(static_cast<size_t>(batch * heads * rows * columns * size_of(dtype))),
        sizes{batch, heads, rows, columns} {
    view.data = memory.data();
    view.dtype = dtype;
    view.stride_b = heads * rows * columns;
    view.stride_h = heads_last ? columns : rows * columns;
    view.stride_row = heads_last ? heads * columns : columns;
    view.stride_col = 1;
  }

  int64_t index(int64_t b, int64_t h, int64_t row, int64_t column) const {
    return b * view.stride_b + h * view.stride_h + row * view.stride_row + column;
  }
  double at(int64_t b, int64_t h, int64_t row, int64_t column) const {
    return load_number(view.data, view.dtype, index(b, h, row, column));
  }
  void set(int64_t b, int64_t h, int64_t row, int64_t column, double x) {
    store_number(view.data, view.dtype, index(b, h, row, column), x);
  }
  int64_t count() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }

  template <class F>
  void fill(F&& number) {
    for (int64_t i = 0; i < count(); ++i) store_number(view.data, view.dtype, i, number());
  }
};

// Sums in double, (batch, heads, rows, columns), and for each the sum of the magnitudes of its terms, with which
// rounding errors grow.
struct Numbers {
  int64_t heads, rows, columns;
  std::vector<double> values, magnitudes;

  Numbers(int64_t batch, int64_t h, int64_t r, int64_t c)
      : heads(h), rows(r), columns(c), values(static_cast<size_t>(batch * h * r * c)), magnitudes(values.size()) {}
  size_t index(int64_t b, int64_t h, int64_t row, int64_t column) const {
    return static_cast<size_t>(((b * heads + h) * rows + row) * columns + column);
  }
  void add(int64_t b, int64_t h, int64_t row, int64_t column, double term, double magnitude) {
    values[index(b, h, row, column)] += term;
    magnitudes[index(b, h, row, column)] += magnitude;
  }
};

}  // namespace attention_ext::test
