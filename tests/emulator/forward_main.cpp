// One forward kernel over several blocks of keys against plain loops; exits with 1 where they differ. The mutation
// tests compile it again and again, each time with one line of the kernel changed.
#include <cstdio>
#include <vector>

#include "gpu/kernels/forward.h"

namespace attention_ext {
namespace {

constexpr int64_t kQueries = 150, kKeys = 200, kDim = 64;
constexpr float kScale = 0.125f, kTolerance = 4e-3f;

float number(int64_t i) { return static_cast<float>((i * 7919 + 104729) % 2001 - 1000) / 1000.0f; }

struct Tensor {
  std::vector<Half> data;
  explicit Tensor(int64_t rows, int64_t seed) : data(static_cast<size_t>(rows * kDim)) {
    for (size_t i = 0; i < data.size(); ++i) data[i] = narrow(Half{}, number(static_cast<int64_t>(i) * 31 + seed));
  }
  View view() { return {data.data(), DType::kFloat16, 0, 0, kDim, 1}; }
  float at(int64_t row, int64_t d) const { return widen(data[static_cast<size_t>(row * kDim + d)]); }
};

ForwardProblem problem_of(Tensor& query, Tensor& key, Tensor& value, Tensor& out, std::vector<float>& logsumexp) {
  ForwardProblem p;
  p.batch = p.heads = p.kv_heads = 1;
  p.seqlen_q = p.max_seqlen_q = kQueries;
  p.seqlen_k = p.max_seqlen_k = kKeys;
  p.head_dim = p.head_dim_v = kDim;
  p.dtype = DType::kFloat16;
  p.scale = kScale;
  p.query = query.view();
  p.key = key.view();
  p.value = value.view();
  p.out = out.view();
  p.logsumexp = logsumexp.data();
  return p;
}

bool is_close(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out, int64_t q) {
  float sum = 0, expected[kDim] = {};
  for (int64_t k = 0; k < kKeys; ++k) {
    float dot = 0;
    for (int64_t d = 0; d < kDim; ++d) dot += query.at(q, d) * key.at(k, d);
    const float weight = std::exp(dot * kScale);
    sum += weight;
    for (int64_t d = 0; d < kDim; ++d) expected[d] += weight * value.at(k, d);
  }
  for (int64_t d = 0; d < kDim; ++d) {
    if (!(std::abs(out.at(q, d) - expected[d] / sum) < kTolerance)) return false;
  }
  return true;
}

int run() {
  Tensor query(kQueries, 1), key(kKeys, 2), value(kKeys, 3), out(kQueries, 4);
  std::vector<float> logsumexp(kQueries);
  const ForwardProblem p = problem_of(query, key, value, out, logsumexp);
  using Kernel = Forward<Compute16<Half>, kDim, ScoreMode::kMask>;
  for (int64_t block = 0; block < Kernel::blocks(p); ++block) run_block<Kernel>(p, nullptr, nullptr, block);
  for (int64_t q = 0; q < kQueries; ++q) {
    if (!is_close(query, key, value, out, q)) {
      std::printf("row %d differs\n", static_cast<int>(q));
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace attention_ext

int main() { return attention_ext::run(); }
