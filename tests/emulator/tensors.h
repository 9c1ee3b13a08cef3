// Tensors, of float16 where not said, for the programs of the mutation tests: (rows, kDim), one head. All memory that
// kernels see lies between guards, and what they are to write begins as NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <span>
#include <vector>

#include "core/problem.h"
#include "gpu/warp/warp.h"
#include "guarded.h"

namespace attention_ext {

constexpr int64_t kQueries = 150, kKeys = 200, kDim = 64;
constexpr double kScale = 0.125;

using Matrix = std::vector<double>;  // (rows, columns)

template <class T>
struct Array {
  test::Guarded memory;
  std::span<T> data;

  explicit Array(int64_t size)
      : memory(static_cast<size_t>(size) * sizeof(T)),
        data(static_cast<T*>(memory.data()), static_cast<size_t>(size)) {}
};

template <class E>
constexpr DType kTypeOf = sizeof(E) == 2 ? DType::kFloat16 : DType::kFloat32;

inline float narrow(float, float x) { return x; }

template <class E>
struct TensorOf : Array<E> {
  using Array<E>::data;
  explicit TensorOf(int64_t rows) : Array<E>(rows * kDim) {}

  // Values between -1 and 1, other ones for each seed.
  TensorOf(int64_t rows, int64_t seed) : TensorOf(rows) {
    for (size_t i = 0; i < data.size(); ++i) {
      const int64_t x = ((static_cast<int64_t>(i) * 31 + seed) * 7919 + 104729) % 2001 - 1000;
      data[i] = narrow(E{}, static_cast<float>(x) / 1000.0f);
    }
  }
  View view() { return {data.data(), kTypeOf<E>, 0, static_cast<int64_t>(data.size()), kDim, 1}; }
  double at(int64_t row, int64_t d) const {
    return static_cast<double>(widen(data[static_cast<size_t>(row * kDim + d)]));
  }
};

using Tensor = TensorOf<Half>;

inline double dot(const Tensor& a, int64_t row_a, const Tensor& b, int64_t row_b) {
  double sum = 0;
  for (int64_t d = 0; d < kDim; ++d) sum += a.at(row_a, d) * b.at(row_b, d);
  return sum;
}

// exp of the score, of queries and keys that are both counted from the first; 0 where the mask of extra_mask.h, in a
// build that lists it, hides the key.
inline double exp_score(const Tensor& query, int64_t row, int64_t q, const Tensor& key, int64_t k) {
#ifdef ATTENTION_EXT_EXTRA_MASK
  if ((k - q >= -30 && k - q <= -8) || k - q >= 20) return 0;
#else
  static_cast<void>(q);
#endif
  return std::exp(kScale * dot(query, row, key, k));
}

inline void add(Matrix& to, int64_t row, double factor, const Tensor& from, int64_t from_row) {
  for (int64_t d = 0; d < kDim; ++d) to[static_cast<size_t>(row * kDim + d)] += factor * from.at(from_row, d);
}

// Prints the first element whose error is larger than `tolerance` times the largest element of `expected`.
inline bool is_close(const char* name, const Matrix& expected, double tolerance, const Matrix& got) {
  double largest = 0;
  for (const double x : expected) largest = std::max(largest, std::abs(x));
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::abs(got[i] - expected[i]) <= tolerance * largest) continue;  // NaN is not
    std::printf("%s[%zu]: expected %g, got %g\n", name, i, expected[i], got[i]);
    return false;
  }
  return true;
}

inline bool is_close(const char* name, const Matrix& expected, double tolerance, const Array<float>& got) {
  return is_close(name, expected, tolerance, Matrix(got.data.begin(), got.data.end()));
}

inline bool is_close(const char* name, const Matrix& expected, double tolerance, const Tensor& got) {
  Matrix values;
  for (const Half x : got.data) values.push_back(static_cast<double>(widen(x)));
  return is_close(name, expected, tolerance, values);
}

// The exit status of a program, once its memory is freed and the guards are checked.
inline int status(bool passes) { return passes && test::tally().failures == 0 ? 0 : 1; }

}  // namespace attention_ext
