// The derivative chain: each operator's kernel for the Autograd key. It calls the operator below autograd, then gives
// the outputs their history and their tangents, which are operators of the chain again:
//
//   attention_forward            backward: attention_backward          forward mode: attention_jvp
//   attention_backward           backward: attention_double_backward   forward mode: itself + attention_double_backward
//   attention_jvp                backward: both of the above           forward mode: itself + composed (composed_jvp.h)
//   attention_double_backward    along its tangents, in which it is linear, operators of the chain; else both raise
//   attention_weights_forward    composed, to any order (autograd_weights.cpp)
//
// Where out and logsumexp are arguments they are taken to be the results of attention_forward on the other arguments:
// derivatives are total, and out and logsumexp have no edge of their own. A tangent or a graph is never dropped.
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "torch/composed_jvp.h"
#include "torch/input_gradients.h"
#include "torch/outputs.h"
#include "torch/tangents.h"

namespace attention_ext {

namespace {

using at::Tensor;
using ops::differentiable;
using ops::kInputs;
constexpr size_t kGrads = 2;  // grad_out and grad_logsumexp, or the tangents of out and logsumexp

// out, logsumexp with respect to the inputs
struct AttentionRule {
  static constexpr const char* kName = "AttentionExtAttentionBackward";

  static variable_list gradients(const Request& request, const Tensor& query, const Tensor& key, const Tensor& value,
                                 const Tensor& out, const Tensor& logsumexp, const Tensor& rng_state,
                                 const AttentionOptions& options) {
    const auto wanted = input_mask(request.wanted, 0);
    if (!request.grads[0].defined() && !request.grads[1].defined()) return variable_list(kInputs);
    if (!request.grads[0].defined()) {
      return of_logsumexp_alone(request.grads[1], wanted, query, key, value, out, logsumexp, rng_state, options);
    }
    const auto gradients = ops::attention_backward(request.grads[0], if_defined(request.grads[1]), query, key, value,
                                                   out, logsumexp, rng_state, options, wanted);
    return gradients_of(gradients, wanted);
  }

 private:
  // logsumexp does not depend on values, not even on those that are not finite.
  static variable_list of_logsumexp_alone(const Tensor& grad, ops::OutputMask wanted, const Tensor& query,
                                          const Tensor& key, const Tensor& value, const Tensor& out,
                                          const Tensor& logsumexp, const Tensor& rng_state,
                                          const AttentionOptions& options) {
    const bool wants_value = std::exchange(wanted[ops::kValue], false);
    const Tensor no_value = value.narrow(3, 0, 0), no_out = out.narrow(3, 0, 0);
    variable_list gradients = gradients_of(ops::attention_backward(at::zeros_like(no_out), grad, query, key, no_value,
                                                                   no_out, logsumexp, rng_state, options, wanted),
                                           wanted);
    if (wants_value) gradients[ops::kValue] = at::zeros_like(value);
    return gradients;
  }
};

ops::Forward attention_forward_autograd(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const AttentionOptions& options, const std::optional<Tensor>& given_state) {
  auto outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return ops::attention_forward(query, key, value, options, given_state);
  }();
  const auto& [out, logsumexp, rng_state] = outputs;
  const auto inputs = differentiable(query, key, value, options);
  if (any_requires_grad(inputs)) {
    record<AttentionRule>({out, logsumexp}, edges_of(inputs), query, key, value, out, logsumexp, rng_state, options);
  }
  if (const auto tangents = tangents_of(query, key, value, options); any_tangent(tangents)) {
    const auto [out_tangent, logsumexp_tangent] = ops::attention_jvp(primal(query), primal(key), primal(value), out,
                                                                     logsumexp, rng_state, tangents, primal(options));
    set_tangent(out, out_tangent);
    set_tangent(logsumexp, logsumexp_tangent);
  }
  return outputs;
}

// the gradients with respect to grad_out, grad_logsumexp and the inputs
struct BackwardRule {
  static constexpr const char* kName = "AttentionExtAttentionDoubleBackward";

  static variable_list gradients(const Request& request, const Tensor& grad_out,
                                 const std::optional<Tensor>& grad_logsumexp, const Tensor& query, const Tensor& key,
                                 const Tensor& value, const Tensor& out, const Tensor& logsumexp,
                                 const Tensor& rng_state, const AttentionOptions& options) {
    const ops::InputTangents tangents = tangents_from(request.grads, 0);
    if (!any_tangent(tangents)) return variable_list(kGrads + kInputs);
    const auto wanted = input_mask(request.wanted, kGrads);
    variable_list gradients(kInputs);
    Tensor out_tangent, logsumexp_tangent;
    if (wants_any(wanted)) {
      const auto all =
          ops::attention_double_backward(tangents, grad_out, grad_logsumexp, query, key, value, out, logsumexp,
                                         rng_state, options, wanted, /*compute_out_tangent=*/request.wanted[0]);
      std::tie(out_tangent, logsumexp_tangent) = std::tie(std::get<0>(all), std::get<1>(all));
      gradients = gradients_of(all, wanted);
    } else {
      std::tie(out_tangent, logsumexp_tangent) =
          ops::attention_jvp(query, key, value, out, logsumexp, rng_state, tangents, options);
    }
    gradients.insert(gradients.begin(),
                     {request.wanted[0] ? out_tangent : Tensor(), request.wanted[1] ? logsumexp_tangent : Tensor()});
    return gradients;
  }
};

ops::Gradients attention_backward_autograd(const Tensor& grad_out, const std::optional<Tensor>& grad_logsumexp,
                                           const Tensor& query, const Tensor& key, const Tensor& value,
                                           const Tensor& out, const Tensor& logsumexp, const Tensor& rng_state,
                                           const AttentionOptions& options, ops::OutputMask output_mask) {
  auto outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return ops::attention_backward(grad_out, grad_logsumexp, query, key, value, out, logsumexp, rng_state, options,
                                   output_mask);
  }();
  const auto exists = existing_gradients(options, output_mask);
  const auto inputs = std::tuple_cat(std::tie(grad_out, grad_logsumexp), differentiable(query, key, value, options));
  if (any_requires_grad(inputs)) {
    record<BackwardRule>(gradients_of(outputs, exists), edges_of(inputs), grad_out, grad_logsumexp, query, key, value,
                         out, logsumexp, rng_state, options);
  }
  const auto tangents = tangents_of(query, key, value, options);
  const Tensor grad_out_tangent = tangent_of(grad_out), grad_logsumexp_tangent = tangent_of(grad_logsumexp);
  const bool has_grad_tangent = grad_out_tangent.defined() || grad_logsumexp_tangent.defined();
  if (!has_grad_tangent && !any_tangent(tangents)) return outputs;
  const auto p_query = primal(query), p_key = primal(key), p_value = primal(value), p_out = primal(out),
             p_logsumexp = primal(logsumexp), p_grad_out = primal(grad_out);
  const auto p_options = primal(options);
  // Gradients are linear in grad_*; their derivative by the inputs comes on top.
  variable_list linear(kInputs), curved(kInputs);
  if (has_grad_tangent) {
    linear = gradients_of(
        ops::attention_backward(or_zeros(grad_out_tangent, p_grad_out), if_defined(grad_logsumexp_tangent), p_query,
                                p_key, p_value, p_out, p_logsumexp, rng_state, p_options, output_mask),
        exists);
  }
  if (any_tangent(tangents)) {
    curved = gradients_of(
        ops::attention_double_backward(tangents, p_grad_out, primal(grad_logsumexp), p_query, p_key, p_value, p_out,
                                       p_logsumexp, rng_state, p_options, output_mask, /*compute_out_tangent=*/false),
        exists);
  }
  const variable_list made = gradients_of(outputs, exists);
  for (size_t i = 0; i < made.size(); ++i) {
    if (made[i].defined()) set_tangent(made[i], sum_of(linear[i], curved[i]));
  }
  return outputs;
}

// out_tangent, logsumexp_tangent with respect to the inputs and their tangents
struct JvpRule {
  static constexpr const char* kName = "AttentionExtAttentionJvpBackward";

  static variable_list gradients(const Request& request, const Tensor& query, const Tensor& key, const Tensor& value,
                                 const Tensor& out, const Tensor& logsumexp, const Tensor& rng_state,
                                 const ops::InputTangents& tangents, const AttentionOptions& options) {
    if (!request.grads[0].defined() && !request.grads[1].defined()) return variable_list(2 * kInputs);
    const Tensor grad_out = or_zeros(request.grads[0], out);
    const auto grad_logsumexp = if_defined(request.grads[1]);
    const auto inputs_wanted = input_mask(request.wanted, 0), tangents_wanted = input_mask(request.wanted, kInputs);
    variable_list gradients(kInputs), of_tangents(kInputs);
    if (wants_any(inputs_wanted)) {
      gradients = gradients_of(
          ops::attention_double_backward(tangents, grad_out, grad_logsumexp, query, key, value, out, logsumexp,
                                         rng_state, options, inputs_wanted, /*compute_out_tangent=*/false),
          inputs_wanted);
    }
    if (wants_any(tangents_wanted)) {
      of_tangents = gradients_of(ops::attention_backward(grad_out, grad_logsumexp, query, key, value, out, logsumexp,
                                                         rng_state, options, tangents_wanted),
                                 tangents_wanted);
    }
    gradients.insert(gradients.end(), of_tangents.begin(), of_tangents.end());
    return gradients;
  }
};

ops::OutputTangents attention_jvp_autograd(const Tensor& query, const Tensor& key, const Tensor& value,
                                           const Tensor& out, const Tensor& logsumexp, const Tensor& rng_state,
                                           const ops::InputTangents& tangents, const AttentionOptions& options) {
  auto outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return ops::attention_jvp(query, key, value, out, logsumexp, rng_state, tangents, options);
  }();
  const auto& [out_tangent, logsumexp_tangent] = outputs;
  const auto all = std::tuple_cat(differentiable(query, key, value, options), tangents.fields());
  if (any_requires_grad(all)) {
    record<JvpRule>({out_tangent, logsumexp_tangent}, edges_of(all), query, key, value, out, logsumexp, rng_state,
                    tangents, options);
  }
  const auto second = tangents_of(query, key, value, options), of_tangents = tangents_of(tangents);
  const bool has_input_tangent = any_tangent(second), has_second_tangent = any_tangent(of_tangents);
  if (!has_input_tangent && !has_second_tangent) return outputs;
  const auto p_query = primal(query), p_key = primal(key), p_value = primal(value), p_out = primal(out),
             p_logsumexp = primal(logsumexp);
  const auto p_options = primal(options);
  ops::OutputTangents linear, curved;  // linear in the tangents, plus the derivative by the inputs
  if (has_second_tangent) {
    linear = ops::attention_jvp(p_query, p_key, p_value, p_out, p_logsumexp, rng_state, of_tangents, p_options);
  }
  if (has_input_tangent) {
    curved = composed_jvp(p_query, p_key, p_value, p_out, p_logsumexp, rng_state, primal(tangents), second, p_options);
  }
  set_tangent(out_tangent, sum_of(std::get<0>(linear), std::get<0>(curved)));
  set_tangent(logsumexp_tangent, sum_of(std::get<1>(linear), std::get<1>(curved)));
  return outputs;
}

constexpr const char* kThirdOrder =
    "attention_double_backward: third-order derivatives are not implemented, except with respect to the tangents";

// out_tangent, logsumexp_tangent and the gradients with respect to the tangents, in which they are linear, and to
// grad_out, grad_logsumexp and the inputs, for which there is no kernel
struct DoubleBackwardRule {
  static constexpr const char* kName = "AttentionExtAttentionTripleBackward";

  static variable_list gradients(const Request& request, const Tensor& grad_out,
                                 const std::optional<Tensor>& grad_logsumexp, const Tensor& query, const Tensor& key,
                                 const Tensor& value, const Tensor& out, const Tensor& logsumexp,
                                 const Tensor& rng_state, const AttentionOptions& options) {
    const auto& g = request.grads;
    const auto wanted = input_mask(request.wanted, 0);
    if (std::none_of(g.begin(), g.end(), [](const Tensor& grad) { return grad.defined(); }))
      return variable_list(kInputs + kGrads + kInputs);
    TORCH_CHECK_NOT_IMPLEMENTED(
        std::find(request.wanted.begin() + kInputs, request.wanted.end(), true) == request.wanted.end(), kThirdOrder);
    variable_list gradients(kInputs + kGrads + kInputs);
    const auto add = [&](const variable_list& terms) {
      for (size_t i = 0; i < terms.size(); ++i) gradients[i] = sum_of(gradients[i], terms[i]);
    };
    if (g[0].defined() || g[1].defined()) {
      add(gradients_of(ops::attention_backward(or_zeros(g[0], out), if_defined(g[1]), query, key, value, out, logsumexp,
                                               rng_state, options, wanted),
                       wanted));
    }
    const ops::InputTangents along = tangents_from(g, kGrads);
    if (any_tangent(along)) {  // the Hessian is symmetric
      add(gradients_of(
          ops::attention_double_backward(along, grad_out, grad_logsumexp, query, key, value, out, logsumexp, rng_state,
                                         options, wanted, /*compute_out_tangent=*/false),
          wanted));
    }
    return gradients;
  }
};

ops::SecondOrder attention_double_backward_autograd(const ops::InputTangents& tangents, const Tensor& grad_out,
                                                    const std::optional<Tensor>& grad_logsumexp, const Tensor& query,
                                                    const Tensor& key, const Tensor& value, const Tensor& out,
                                                    const Tensor& logsumexp, const Tensor& rng_state,
                                                    const AttentionOptions& options, ops::OutputMask output_mask,
                                                    bool compute_out_tangent) {
  const auto fixed = std::tuple_cat(std::tie(grad_out, grad_logsumexp), differentiable(query, key, value, options));
  std::apply(
      [](const auto&... input) { TORCH_CHECK_NOT_IMPLEMENTED((!tangent_of(input).defined() && ...), kThirdOrder); },
      fixed);
  auto outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return ops::attention_double_backward(tangents, grad_out, grad_logsumexp, query, key, value, out, logsumexp,
                                          rng_state, options, output_mask, compute_out_tangent);
  }();
  const auto exists = existing_gradients(options, output_mask);
  const auto made = [&](const ops::SecondOrder& all) {
    variable_list tensors = gradients_of(all, exists);
    tensors.insert(tensors.begin(), {compute_out_tangent ? std::get<0>(all) : Tensor(), std::get<1>(all)});
    return tensors;
  };
  const variable_list differentiable_outputs = made(outputs);
  const auto inputs = std::tuple_cat(tangents.fields(), fixed);
  if (any_requires_grad(inputs)) {
    record<DoubleBackwardRule>(differentiable_outputs, edges_of(inputs), grad_out, grad_logsumexp, query, key, value,
                               out, logsumexp, rng_state, options);
  }
  if (const auto of_tangents = tangents_of(tangents); any_tangent(of_tangents)) {
    const variable_list output_tangents =
        made(ops::attention_double_backward(of_tangents, grad_out, grad_logsumexp, query, key, value, out, logsumexp,
                                            rng_state, options, output_mask, compute_out_tangent));
    for (size_t i = 0; i < output_tangents.size(); ++i) {
      if (differentiable_outputs[i].defined()) set_tangent(differentiable_outputs[i], output_tangents[i]);
    }
  }
  return outputs;
}

TORCH_LIBRARY_IMPL(attention_ext, Autograd, m) {
  m.impl("attention_forward", flat_kernel<attention_forward_autograd>);
  m.impl("attention_backward", flat_kernel<attention_backward_autograd>);
  m.impl("attention_jvp", flat_kernel<attention_jvp_autograd>);
  m.impl("attention_double_backward", flat_kernel<attention_double_backward_autograd>);
}

}  // namespace

}  // namespace attention_ext
