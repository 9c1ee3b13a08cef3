// Every kernel that shares memory between threads, over calls that reach each of its barriers, waits and commits; exits
// with 1 where the emulator finds one missing. Values are checked elsewhere.
#include <exception>

#include "gpu/kernels/backward.h"
#include "gpu/kernels/decode.h"
#include "gpu/kernels/forward.h"
#include "gpu/kernels/jvp.h"
#include "gpu/kernels/simt/mask_gradient.h"
#include "gpu/kernels/weights.h"
#include "tensors.h"

namespace attention_ext {
namespace {

constexpr int64_t kHeads = 2;
constexpr int kBucket = 64;

template <class E>
struct Tensors {
  using Tensor = TensorOf<E>;
  Tensor query{kHeads * kQueries, 1}, key{kKeys, 2}, value{kKeys, 3}, grad_out{kHeads * kQueries, 4};
  Tensor out{kHeads * kQueries}, grad_query{kHeads * kQueries}, grad_key{kKeys}, grad_value{kKeys};
  Array<E> weights{kQueries * kKeys};
  Array<float> logsumexp{kHeads * kQueries}, logsumexp_tangent{kHeads * kQueries}, grad_mask{1};
  Array<double> slopes{kHeads}, sinks{kHeads}, grad_slopes{kHeads}, grad_sinks{kHeads};

  Tensors() {
    std::ranges::fill(logsumexp.data, 1.0f);
    std::ranges::fill(slopes.data, 0.1);
    std::ranges::fill(sinks.data, 0.3);
  }
};

template <class E>
View of_heads(TensorOf<E>& x) {
  View view = x.view();
  view.stride_h = kQueries * kDim;
  return view;
}

// Of `queries` and `keys`, causal from the last corner: with more queries than keys the first tiles see no key.
template <class Problem, class E>
Problem problem_of(Tensors<E>& x, int64_t queries, int64_t keys) {
  Problem p;
  p.batch = p.kv_heads = 1;
  p.heads = kHeads;
  p.seqlen_q = p.max_seqlen_q = queries;
  p.seqlen_k = p.max_seqlen_k = keys;
  p.head_dim = p.head_dim_v = kDim;
  p.dtype = kTypeOf<E>;
  p.scale = kScale;
  p.window_right = 0;
  p.bottom_right = true;
  p.query = of_heads(x.query);
  p.key = x.key.view();
  p.value = x.value.view();
  p.alibi_slopes = x.slopes.data.data();
  p.sinks = x.sinks.data.data();
  p.logsumexp = x.logsumexp.data.data();
  return p;
}

template <class Kernel>
void run_kernel(const AttentionProblem& p, void* workspace) {
  for (int64_t block = 0; block < Kernel::blocks(static_cast<const typename Kernel::Problem&>(p)); ++block) {
    run_block<Kernel>(p, workspace, nullptr, block);
  }
}

template <class E>
void set_gradients(DoubleBackwardProblem& p, Tensors<E>& x) {
  p.out = of_heads(x.out);
  p.grad_out = of_heads(x.grad_out);
  p.tangent.query = of_heads(x.query);
  p.tangent.key = x.key.view();
  p.tangent.value = x.value.view();
  p.logsumexp_tangent = x.logsumexp_tangent.data.data();
  p.grad_query = of_heads(x.grad_query);
  p.grad_key = x.grad_key.view();
  p.grad_value = x.grad_value.view();
  p.grad_attn_mask = {x.grad_mask.data.data(), DType::kFloat32, 0, 0, 0, 0};
  p.grad_alibi_slopes = x.grad_slopes.data.data();
  p.grad_sinks = x.grad_sinks.data.data();
}

template <Order kOrder, class C, int kKeyBucket = kBucket>
void run_query_and_key(const DoubleBackwardProblem& p, void* workspace) {
  run_kernel<QueryGradient<C, kBucket, ScoreMode::kAll, kOrder>>(p, workspace);
  run_kernel<KeyGradient<C, kKeyBucket, ScoreMode::kAll, kOrder, KeyResult::kBoth>>(p, workspace);
}

template <Order kOrder, class C>
void run_gradients(const DoubleBackwardProblem& p, void* workspace) {
  using Queries = QueryGradient<C, kBucket, ScoreMode::kAll, kOrder>;
  run_query_and_key<kOrder, C>(p, workspace);
  run_kernel<MaskGradient<C, kBucket, kOrder>>(p, workspace);
  run_kernel<HeadGradient<C, kOrder, Queries::kQueries>>(p, workspace);
}

void run(int64_t queries, int64_t keys) {
  using C = Compute16<Half>;
  Tensors<Half> x;
  auto forward = problem_of<ForwardProblem>(x, queries, keys);
  forward.out = of_heads(x.out);
  run_kernel<Forward<C, kBucket, ScoreMode::kAll>>(forward, nullptr);
  run_kernel<Decode<C, kBucket, ScoreMode::kAll>>(forward, nullptr);

  auto weights = problem_of<WeightsProblem>(x, queries, keys);
  weights.row_end = queries;
  weights.average_heads = true;
  weights.weights = {x.weights.data.data(), DType::kFloat16, 0, 0, keys, 1};
  run_kernel<Weights<C, kBucket, ScoreMode::kAll>>(weights, nullptr);

  auto p = problem_of<DoubleBackwardProblem>(x, queries, keys);
  set_gradients(p, x);
  const Array<char> memory(static_cast<int64_t>(BackwardMemory<float>::bytes(p, queries * kHeads)));
  void* const workspace = memory.data.data();
  run_kernel<Jvp<C, kBucket, ScoreMode::kAll>>(p, workspace);
  run_gradients<Order::kFirst, C>(p, workspace);
  run_gradients<Order::kSecond, C>(p, workspace);
  if (queries < 20) run_kernel<simt::MaskGradient<float, Order::kFirst>>(p, workspace);
}

// Of first order the next tiles arrive beside the split ones, or in their place; of second order there is one stage,
// where all above have two.
void run_float(int64_t queries, int64_t keys) {
  Tensors<float> x;
  auto p = problem_of<DoubleBackwardProblem>(x, queries, keys);
  set_gradients(p, x);
  const Array<char> memory(static_cast<int64_t>(BackwardMemory<float>::bytes(p, queries * kHeads)));
  run_query_and_key<Order::kFirst, ComputeFloat, 2 * kBucket>(p, memory.data.data());
  run_query_and_key<Order::kSecond, ComputeFloat>(p, memory.data.data());
}

}  // namespace
}  // namespace attention_ext

int main() {
  try {
    attention_ext::run(attention_ext::kQueries, attention_ext::kKeys);
    attention_ext::run(attention_ext::kQueries, 10);
    attention_ext::run(9, attention_ext::kKeys);
    attention_ext::run_float(attention_ext::kQueries, attention_ext::kKeys);
    attention_ext::run_float(attention_ext::kQueries, 10);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  return attention_ext::status(true);
}
