// The forward kernel over several blocks of queries and keys against plain loops; exits with 1 where they differ. The
// mutation tests compile it again and again, each time with one line of a kernel changed.
#include "gpu/kernels/forward.h"
#include "tensors.h"

namespace attention_ext {
namespace {

constexpr double kTolerance = 2e-3;

ForwardProblem problem_of(Tensor& query, Tensor& key, Tensor& value, Tensor& out, Array<float>& logsumexp) {
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
  p.logsumexp = logsumexp.data.data();
  return p;
}

bool run() {
  Tensor query(kQueries, 1), key(kKeys, 2), value(kKeys, 3), out(kQueries);
  Array<float> logsumexp(kQueries);
  const ForwardProblem p = problem_of(query, key, value, out, logsumexp);
  using Kernel = Forward<Compute16<Half>, kDim, ScoreMode::kMask>;
  for (int64_t block = 0; block < Kernel::blocks(p); ++block) run_block<Kernel>(p, nullptr, nullptr, block);

  Matrix expected(kQueries * kDim), expected_logsumexp;
  for (int64_t q = 0; q < kQueries; ++q) {
    double sum = 0;
    Matrix weight(kKeys);
    for (int64_t k = 0; k < kKeys; ++k) sum += weight[k] = exp_score(query, q, q, key, k);
    for (int64_t k = 0; k < kKeys; ++k) add(expected, q, weight[k] / sum, value, k);
    expected_logsumexp.push_back(std::log(sum));
  }
  return is_close("out", expected, kTolerance, out) && is_close("logsumexp", expected_logsumexp, kTolerance, logsumexp);
}

}  // namespace
}  // namespace attention_ext

int main() { return attention_ext::status(attention_ext::run()); }
