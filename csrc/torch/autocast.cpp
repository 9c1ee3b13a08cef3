// Under autocast query, key, value and a float mask are cast as torch casts them for its own attention: to the dtype
// the user's autocast names, float64 excepted. Everything else is per head or per row and keeps its precision.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "torch/ops.h"

namespace attention_ext {

namespace {

using at::Tensor;

template <c10::DeviceType device>
Tensor cast(const Tensor& tensor) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

template <c10::DeviceType device>
AttentionOptions cast(AttentionOptions options) {
  if (options.attn_mask) options.attn_mask = cast<device>(*options.attn_mask);
  return options;
}

template <c10::DeviceType device>
c10::impl::ExcludeDispatchKeyGuard below_autocast() {
  return c10::impl::ExcludeDispatchKeyGuard(at::autocast::get_autocast_dispatch_key_from_device_type(device));
}

template <c10::DeviceType device>
ops::Forward attention_forward_autocast(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const AttentionOptions& options, const std::optional<Tensor>& rng_state) {
  const auto below = below_autocast<device>();
  return ops::attention_forward(cast<device>(query), cast<device>(key), cast<device>(value), cast<device>(options),
                                rng_state);
}

template <c10::DeviceType device>
Tensor attention_weights_forward_autocast(const Tensor& query, const Tensor& key, const Tensor& logsumexp,
                                          const Tensor& rng_state, const AttentionOptions& options, bool average_heads,
                                          std::optional<c10::SymInt> row_begin, std::optional<c10::SymInt> row_end) {
  const auto below = below_autocast<device>();
  return ops::attention_weights_forward(cast<device>(query), cast<device>(key), logsumexp, rng_state,
                                        cast<device>(options), average_heads, row_begin, row_end);
}

template <c10::DeviceType device>
void implement(torch::Library& m) {
  m.impl("attention_forward", flat_kernel<attention_forward_autocast<device>>);
  m.impl("attention_weights_forward", flat_kernel<attention_weights_forward_autocast<device>>);
}

TORCH_LIBRARY_IMPL(attention_ext, AutocastCPU, m) { implement<c10::DeviceType::CPU>(m); }
TORCH_LIBRARY_IMPL(attention_ext, AutocastCUDA, m) { implement<c10::DeviceType::CUDA>(m); }

}  // namespace

}  // namespace attention_ext
