// The arguments that all operators share, and how a function of one AttentionOptions meets torch's dispatcher, which
// knows them only one by one. They are spelled here and in the schema text, nowhere else.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>

namespace attention_ext {

// score = softcap * tanh(scale * query . key / softcap) + attn_mask - alibi_slope * |diagonal - k|, then hidden keys.
struct AttentionOptions {
  std::optional<at::Tensor> attn_mask;  // broadcast to (batch, heads, len_q, len_k); bool (true: attend) or added
  double dropout_p = 0.0;
  bool is_causal = false;
  std::optional<double> scale;                           // none: 1 / sqrt(head_dim)
  bool enable_gqa = false;                               // allows heads to be a multiple of kv_heads
  std::string_view causal_alignment = "top_left";        // or "bottom_right": the corner that the diagonal goes through
  std::optional<int64_t> window_left, window_right;      // keys from diagonal - left to diagonal + right
  double softcap = 0.0;                                  // 0: none
  std::optional<at::Tensor> alibi_slopes;                // (heads,) or (batch, heads)
  std::optional<at::Tensor> sinks;                       // (heads,) or (batch, heads): a logit that joins the normaliser
  std::optional<at::Tensor> key_lengths;                 // (batch,)
  std::optional<at::Tensor> cu_seqlens_q, cu_seqlens_k;  // (sequences + 1,), with batch 1 and sequences packed

  auto fields() const {
    return std::tie(attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment, window_left, window_right,
                    softcap, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k);
  }
};

namespace detail {

template <class... T>
struct Types {};

// What the dispatcher hands over for a field: tensors by reference, numbers by value.
template <class Field>
using Argument = std::conditional_t<std::is_same_v<Field, std::optional<at::Tensor>>, const Field&, Field>;

template <class... Field>
Types<Argument<Field>...> arguments_of(const std::tuple<const Field&...>&);

using OptionArguments = decltype(arguments_of(std::declval<AttentionOptions>().fields()));

template <class Before, class Rest>
struct SplitAtOptions;
template <class... Before, class... After>
struct SplitAtOptions<Types<Before...>, Types<const AttentionOptions&, After...>> {
  using Lead = Types<Before...>;
  using Trailing = Types<After...>;
};
template <class... Before, class Next, class... After>
struct SplitAtOptions<Types<Before...>, Types<Next, After...>> : SplitAtOptions<Types<Before..., Next>, Types<After...>> {
};

template <class Result, class Lead, class Options, class Trailing>
struct FlatAs;
template <class Result, class... Lead, class... Option, class... Trailing>
struct FlatAs<Result, Types<Lead...>, Types<Option...>, Types<Trailing...>> {
  using Function = Result (*)(Lead..., const AttentionOptions&, Trailing...);
  using Signature = Result(Lead..., Option..., Trailing...);

  template <Function function>
  static Result kernel(Lead... lead, Option... option, Trailing... trailing) {
    return function(lead..., AttentionOptions{option...}, trailing...);
  }

  // Calls flat(lead..., option..., trailing...).
  template <class Callable>
  static decltype(auto) spread(const Callable& flat, Lead... lead, const AttentionOptions& options,
                               Trailing... trailing) {
    return std::apply([&](const auto&... option) -> decltype(auto) { return flat(lead..., option..., trailing...); },
                      options.fields());
  }
};

template <class Function>
struct Flat;
template <class Result, class... Argument>
struct Flat<Result(Argument...)>
    : FlatAs<Result, typename SplitAtOptions<Types<>, Types<Argument...>>::Lead, OptionArguments,
             typename SplitAtOptions<Types<>, Types<Argument...>>::Trailing> {};

}  // namespace detail

// The flat form of `Result function(lead..., const AttentionOptions&, trailing...)`, as the dispatcher calls it.
template <auto function>
constexpr auto* flat_kernel =
    &detail::Flat<std::remove_pointer_t<decltype(function)>>::template kernel<function>;

// An operator by name, called as Function is: Result(lead..., const AttentionOptions&, trailing...).
template <class Function>
class Operator {
 public:
  explicit Operator(const char* name)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<typename Flat::Signature>()) {}

  template <class... Argument>
  auto operator()(const Argument&... argument) const {
    return Flat::spread([&](const auto&... flat) { return handle_.call(flat...); }, argument...);
  }

 private:
  using Flat = detail::Flat<Function>;
  c10::TypedOperatorHandle<typename Flat::Signature> handle_;
};

}  // namespace attention_ext
