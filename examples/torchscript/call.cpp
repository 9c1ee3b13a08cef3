// Calls the operator from C++ through its header, with gradients, and compares it with torch's own attention.
#include <attention_ext/attention.h>
#include <torch/torch.h>

#include <algorithm>
#include <iostream>

int main() {
  torch::manual_seed(0);
  const auto like = torch::dtype(torch::kFloat64).requires_grad(true);
  const auto query = torch::randn({2, 4, 33, 16}, like);
  const auto key = torch::randn({2, 2, 33, 16}, like);  // two query heads share one key head
  const auto value = torch::randn({2, 2, 33, 16}, like);

  attention_ext::AttentionOptions options;
  options.is_causal = true;
  options.enable_gqa = true;
  const auto [out, logsumexp, rng_state] = attention_ext::attention(query, key, value, options);
  const auto expected = at::scaled_dot_product_attention(query, key, value, {}, 0.0, true, std::nullopt, true);

  const auto grad_out = torch::randn_like(out);
  const auto gradients = torch::autograd::grad({out}, {query, key, value}, {grad_out});
  const auto expected_gradients = torch::autograd::grad({expected}, {query, key, value}, {grad_out});

  double worst = (out - expected).abs().max().item<double>();
  for (size_t i = 0; i < gradients.size(); ++i) {
    worst = std::max(worst, (gradients[i] - expected_gradients[i]).abs().max().item<double>());
  }
  std::cout << "out " << out.sizes() << ", logsumexp " << logsumexp.sizes() << ", largest difference " << worst << "\n";
  return worst < 1e-10 ? 0 : 1;
}
