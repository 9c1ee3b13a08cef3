// Forward passes over keys in parts against plain loops: the kernel for few queries, with one and with several parts,
// and the kernel for many with several; exits with 1 where they differ. The mutation tests compile it as
// forward_main.cpp.
#include "gpu/kernels/decode.h"
#include "gpu/kernels/forward.h"
#include "tensors.h"

namespace attention_ext {
namespace {

constexpr int64_t kHeads = 3, kParts = 3;
constexpr double kTolerance = 2e-3;
using C = Compute16<Half>;

struct Call {
  int64_t queries;
  Tensor query, key{kKeys, 2}, value{kKeys, 3}, out;
  Array<float> logsumexp;
  ForwardProblem problem;

  Call(int64_t queries, int64_t parts)
      : queries(queries), query(kHeads * queries, 1), out(kHeads * queries), logsumexp(kHeads * queries) {
    problem.batch = problem.kv_heads = 1;
    problem.heads = kHeads;
    problem.seqlen_q = problem.max_seqlen_q = queries;
    problem.seqlen_k = problem.max_seqlen_k = kKeys;
    problem.head_dim = problem.head_dim_v = kDim;
    problem.dtype = DType::kFloat16;
    problem.scale = kScale;
    problem.key_parts = parts;
    problem.query = heads_of(query);
    problem.key = key.view();
    problem.value = value.view();
    problem.out = heads_of(out);
    problem.logsumexp = logsumexp.data.data();
  }

  View heads_of(Tensor& x) const {
    View view = x.view();
    view.stride_h = queries * kDim;
    return view;
  }

  bool is_right() const {
    Matrix expected(static_cast<size_t>(kHeads * queries * kDim)), expected_logsumexp;
    for (int64_t row = 0; row < kHeads * queries; ++row) {
      double sum = 0;
      Matrix weight(kKeys);
      for (int64_t k = 0; k < kKeys; ++k) {
        sum += weight[static_cast<size_t>(k)] = exp_score(query, row, row % queries, key, k);
      }
      for (int64_t k = 0; k < kKeys; ++k) add(expected, row, weight[static_cast<size_t>(k)] / sum, value, k);
      expected_logsumexp.push_back(std::log(sum));
    }
    return is_close("out", expected, kTolerance, out) &&
           is_close("logsumexp", expected_logsumexp, kTolerance, logsumexp);
  }
};

template <class Kernel>
void run_kernel(const ForwardProblem& p, void* workspace) {
  for (int64_t block = 0; block < Kernel::blocks(p); ++block) run_block<Kernel>(p, workspace, nullptr, block);
}

template <class Kernel, class Tiles>
bool run(int64_t queries, int64_t parts) {
  const Call call(queries, parts);
  const ForwardProblem& p = call.problem;
  const Array<char> memory(static_cast<int64_t>(PartsWorkspace<float>::bytes(p, parts)));
  run_kernel<Kernel>(p, memory.data.data());
  if (parts > 1) run_kernel<MergeParts<C, Tiles>>(p, memory.data.data());
  return call.is_right();
}

}  // namespace
}  // namespace attention_ext

int main() {
  using namespace attention_ext;
  using Few = Decode<C, kDim, ScoreMode::kMask>;
  using Many = Forward<C, kDim, ScoreMode::kMask, Part::kSplit>;
  return status(run<Few, GroupTiles>(7, 1) && run<Few, GroupTiles>(7, kParts) &&
                run<Many, Many::Tiles>(kQueries, kParts));
}
