// The backward and jvp kernels over several blocks of queries and keys against plain loops; exits with 1 where they
// differ. The mutation tests compile it again and again, each time with one line of a kernel changed.
#include "gpu/kernels/backward.h"
#include "gpu/kernels/jvp.h"
#include "tensors.h"

namespace attention_ext {
namespace {

constexpr int64_t kHeads = 2;  // of one key head
constexpr double kTolerance = 2e-3;

using Compute = Compute16<Half>;

struct Inputs {
  Tensor query{kHeads * kQueries, 1}, key{kKeys, 2}, value{kKeys, 3}, grad_out{kHeads * kQueries, 4};
  Tensor query_tangent{kHeads * kQueries, 5}, key_tangent{kKeys, 6}, value_tangent{kKeys, 7};
  Array<float> grad_logsumexp{kHeads * kQueries};

  Inputs() { std::ranges::fill(grad_logsumexp.data, 0.5f); }
};

struct Outputs {
  Tensor out{kHeads * kQueries}, grad_query{kHeads * kQueries}, grad_key{kKeys}, grad_value{kKeys};
  Tensor out_tangent{kHeads * kQueries};
  Array<float> logsumexp{kHeads * kQueries}, logsumexp_tangent{kHeads * kQueries};
};

// out and logsumexp are written to `outputs`, as inputs of the kernels.
struct Expected {
  Matrix out = Matrix(kHeads * kQueries * kDim), grad_query = out, out_tangent = out;
  Matrix grad_key = Matrix(kKeys * kDim), grad_value = grad_key;
  Matrix logsumexp_tangent = Matrix(kHeads * kQueries);

  Expected(const Inputs& x, Outputs& outputs) {
    for (int64_t q = 0; q < kHeads * kQueries; ++q) add_row(x, outputs, q);
  }

  void add_row(const Inputs& x, Outputs& outputs, int64_t q) {
    Matrix prob(kKeys), grad_prob(kKeys), score_tangent(kKeys);
    double sum = 0, delta = -static_cast<double>(x.grad_logsumexp.data[static_cast<size_t>(q)]), mean = 0;
    for (int64_t k = 0; k < kKeys; ++k) sum += prob[k] = exp_score(x.query, q, q % kQueries, x.key, k);
    for (int64_t k = 0; k < kKeys; ++k) {
      prob[k] /= sum;
      grad_prob[k] = dot(x.grad_out, q, x.value, k);
      delta += prob[k] * grad_prob[k];
      score_tangent[k] = kScale * (dot(x.query_tangent, q, x.key, k) + dot(x.query, q, x.key_tangent, k));
      mean += prob[k] * score_tangent[k];
      add(out, q, prob[k], x.value, k);
    }
    for (int64_t k = 0; k < kKeys; ++k) {
      const double grad_score = kScale * prob[k] * (grad_prob[k] - delta);
      add(grad_query, q, grad_score, x.key, k);
      add(grad_key, k, grad_score, x.query, q);
      add(grad_value, k, prob[k], x.grad_out, q);
      add(out_tangent, q, prob[k] * (score_tangent[k] - mean), x.value, k);
      add(out_tangent, q, prob[k], x.value_tangent, k);
    }
    outputs.logsumexp.data[static_cast<size_t>(q)] = static_cast<float>(std::log(sum));
    logsumexp_tangent[static_cast<size_t>(q)] = mean;
    for (int64_t d = 0; d < kDim; ++d) {
      const auto i = static_cast<size_t>(q * kDim + d);
      outputs.out.data[i] = narrow(Half{}, static_cast<float>(out[i]));
    }
  }
};

View of_heads(Tensor& x) {
  View view = x.view();
  view.stride_h = kQueries * kDim;
  return view;
}

template <class Problem>
Problem problem_of(Inputs& x, Outputs& outputs) {
  Problem p;
  p.batch = p.kv_heads = 1;
  p.heads = kHeads;
  p.seqlen_q = p.max_seqlen_q = kQueries;
  p.seqlen_k = p.max_seqlen_k = kKeys;
  p.head_dim = p.head_dim_v = kDim;
  p.dtype = DType::kFloat16;
  p.scale = kScale;
  p.query = of_heads(x.query);
  p.key = x.key.view();
  p.value = x.value.view();
  p.out = of_heads(outputs.out);
  p.logsumexp = outputs.logsumexp.data.data();
  return p;
}

template <class Kernel>
void run_kernel(const typename Kernel::Problem& p, void* workspace) {
  for (int64_t block = 0; block < Kernel::blocks(p); ++block) run_block<Kernel>(p, workspace, nullptr, block);
}

void run_backward(Inputs& x, Outputs& outputs) {
  auto p = problem_of<BackwardProblem>(x, outputs);
  p.grad_out = of_heads(x.grad_out);
  p.grad_logsumexp = x.grad_logsumexp.data.data();
  p.grad_query = of_heads(outputs.grad_query);
  p.grad_key = outputs.grad_key.view();
  p.grad_value = outputs.grad_value.view();
  using Queries = QueryGradient<Compute, kDim, ScoreMode::kMask, Order::kFirst>;
  const Array<char> workspace(static_cast<int64_t>(BackwardMemory<float>::bytes(p, Queries::blocks(p))));
  run_kernel<Delta<Compute>>(p, workspace.data.data());
  run_kernel<Queries>(p, workspace.data.data());
  run_kernel<KeyGradient<Compute, kDim, ScoreMode::kMask, Order::kFirst, KeyResult::kBoth>>(p, workspace.data.data());
}

void run_jvp(Inputs& x, Outputs& outputs) {
  auto p = problem_of<JvpProblem>(x, outputs);
  p.tangent.query = of_heads(x.query_tangent);
  p.tangent.key = x.key_tangent.view();
  p.tangent.value = x.value_tangent.view();
  p.out_tangent = of_heads(outputs.out_tangent);
  p.logsumexp_tangent = outputs.logsumexp_tangent.data.data();
  run_kernel<Jvp<Compute, kDim, ScoreMode::kMask>>(p, nullptr);
}

bool run() {
  Inputs x;
  Outputs outputs;
  const Expected expected(x, outputs);
  run_backward(x, outputs);
  run_jvp(x, outputs);
  return is_close("grad_query", expected.grad_query, kTolerance, outputs.grad_query) &&
         is_close("grad_key", expected.grad_key, kTolerance, outputs.grad_key) &&
         is_close("grad_value", expected.grad_value, kTolerance, outputs.grad_value) &&
         is_close("out_tangent", expected.out_tangent, kTolerance, outputs.out_tangent) &&
         is_close("logsumexp_tangent", expected.logsumexp_tangent, kTolerance, outputs.logsumexp_tangent);
}

}  // namespace
}  // namespace attention_ext

int main() { return attention_ext::status(attention_ext::run()); }
