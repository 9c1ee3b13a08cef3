// Tensors of float16 for the programs of the mutation tests: (rows, kDim), one head.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "core/problem.h"
#include "gpu/warp/warp.h"

namespace attention_ext {

constexpr int64_t kQueries = 150, kKeys = 200, kDim = 64;
constexpr double kScale = 0.125;

using Matrix = std::vector<double>;  // (rows, columns)

struct Tensor {
  std::vector<Half> data;

  // Values between -1 and 1, other ones for each seed.
  Tensor(int64_t rows, int64_t seed) : data(static_cast<size_t>(rows * kDim)) {
    for (size_t i = 0; i < data.size(); ++i) {
      const int64_t x = ((static_cast<int64_t>(i) * 31 + seed) * 7919 + 104729) % 2001 - 1000;
      data[i] = narrow(Half{}, static_cast<float>(x) / 1000.0f);
    }
  }
  View view() { return {data.data(), DType::kFloat16, 0, static_cast<int64_t>(data.size()), kDim, 1}; }
  double at(int64_t row, int64_t d) const {
    return static_cast<double>(widen(data[static_cast<size_t>(row * kDim + d)]));
  }
};

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
    if (std::abs(got[i] - expected[i]) <= tolerance * largest) continue;
    std::printf("%s[%zu]: expected %g, got %g\n", name, i, expected[i], got[i]);
    return false;
  }
  return true;
}

inline bool is_close(const char* name, const Matrix& expected, double tolerance, const Tensor& got) {
  Matrix values;
  for (const Half x : got.data) values.push_back(static_cast<double>(widen(x)));
  return is_close(name, expected, tolerance, values);
}

}  // namespace attention_ext
