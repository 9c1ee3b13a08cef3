// A node of the autograd graph from one function of gradients and arguments: keeping the arguments, giving them back,
// freeing them and compiled autograd are written here, once, for every rule.
#pragma once

#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <mutex>

#include "attention_ext/flat.h"

namespace attention_ext {

using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// torch 2.11 holds nodes by std::shared_ptr, later versions by c10::intrusive_ptr.
template <class Made, class... Argument>
auto make_node(Argument&&... argument) {
  if constexpr (std::is_same_v<decltype(torch::autograd::Edge::function), std::shared_ptr<Node>>) {
    return std::shared_ptr<Made>(new Made(std::forward<Argument>(argument)...), [](Made* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Made>(std::forward<Argument>(argument)...);
  }
}

// The input of a rule: gradients of the outputs (undefined means zero), and which next edges want one.
struct Request {
  const variable_list& grads;
  const std::vector<bool>& wanted;
};

// How a node keeps an argument between forward and backward, and the form in which compiled autograd sees it.
template <class T>
struct Keep {
  using Kept = T;
  using Plain = T;
};
template <>
struct Keep<at::Tensor> {
  using Kept = SavedVariable;
  using Plain = at::Tensor;
};
template <>
struct Keep<std::optional<at::Tensor>> {
  using Kept = SavedVariable;
  using Plain = std::optional<at::Tensor>;
};
template <>
struct Keep<std::string_view> {
  using Kept = std::string;
  using Plain = std::string;
};

template <class Rule, class FlatSignature>
class RuleNodeOf;

// Rule has kName and `variable_list gradients(const Request&, arguments..., const AttentionOptions&, arguments...)`.
template <class Rule>
using RuleNode = RuleNodeOf<Rule, typename detail::Flat<decltype(Rule::gradients)>::Signature>;

template <class Rule, class... Argument>
class RuleNodeOf<Rule, variable_list(const Request&, Argument...)> : public Node {
 public:
  // After the outputs among them got this node as their history, so that they are kept as outputs.
  void keep(const Argument&... argument) { kept_ = std::tuple<Kept<Argument>...>{to_keep(argument)...}; }

  std::string name() const override { return Rule::kName; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::apply([](auto&... kept) { (release(kept), ...); }, kept_);
  }

  variable_list apply(variable_list&& grads) override {
    // The autocast state of the caller of backward() does not apply here.
    const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
    return run({grads, wanted()}, unpack());
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    std::apply([&](const auto&... kept) { (collect(args, kept), ...); }, kept_);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    using torch::dynamo::autograd::IValuePacker;
    std::apply([&](auto&... kept) { (saved.before(kept), ...); }, kept_);
    torch::dynamo::autograd::PackedArgs packed;
    packed.pack(wanted());
    std::apply([&](const auto&... plain) { (packed.pack(plain), ...); }, unpack());

    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    static std::once_flag bound;
    std::call_once(bound, [&] {
      const std::vector<at::TypePtr> types{IValuePacker<std::vector<bool>>::packed_type(),
                                           IValuePacker<Plain<Argument>>::packed_type()...};
      compiler->bind_function(saved.get_py_compiler(), Rule::kName, run_packed, types);
    });
    const auto metadata = IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
        torch::dynamo::autograd::get_input_metadata(next_edges()));
    auto gradients = compiler->call_function(saved.get_py_compiler(), "apply_functional", Rule::kName, grads,
                                             packed.vec(), metadata);
    std::apply([&](auto&... kept) { (saved.after(kept), ...); }, kept_);
    return gradients;
  }

 private:
  template <class T>
  using Kept = typename Keep<std::decay_t<T>>::Kept;
  template <class T>
  using Plain = typename Keep<std::decay_t<T>>::Plain;

  static variable_list run(const Request& request, const std::tuple<Plain<Argument>...>& arguments) {
    return std::apply([&](const auto&... argument) { return flat_kernel<Rule::gradients>(request, argument...); },
                      arguments);
  }

  static variable_list run_packed(const variable_list& grads, const std::vector<c10::IValue>& values) {
    torch::dynamo::autograd::PackedArgs packed(values);
    const auto wanted = packed.unpack<std::vector<bool>>();
    return run({grads, wanted}, std::tuple<Plain<Argument>...>{packed.unpack<Plain<Argument>>()...});
  }

  std::vector<bool> wanted() const {
    std::vector<bool> wanted(num_outputs());
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = task_should_compute_output(i);
    return wanted;
  }

  std::tuple<Plain<Argument>...> unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto self = getptr();
    return unpack_as<std::tuple<Plain<Argument>...>>(self, std::index_sequence_for<Argument...>());
  }
  template <class Plains, class Self, size_t... i>
  Plains unpack_as(const Self& self, std::index_sequence<i...>) {
    return Plains{unpacked<std::tuple_element_t<i, Plains>>(std::get<i>(kept_), self)...};
  }

  SavedVariable to_keep(const at::Tensor& tensor) const {
    return SavedVariable(tensor, /*is_output=*/tensor.defined() && tensor.grad_fn().get() == this);
  }
  SavedVariable to_keep(const std::optional<at::Tensor>& tensor) const {
    return to_keep(tensor.value_or(at::Tensor()));
  }
  static std::string to_keep(std::string_view text) { return std::string(text); }
  template <class T>
  static T to_keep(const T& value) {
    return value;
  }

  template <class PlainType, class Self>
  static PlainType unpacked(const SavedVariable& kept, const Self& self) {
    at::Tensor tensor = kept.unpack(self);
    if constexpr (std::is_same_v<PlainType, at::Tensor>) {
      return tensor;
    } else {
      return tensor.defined() ? PlainType(std::move(tensor)) : std::nullopt;
    }
  }
  template <class PlainType, class Self>
  static PlainType unpacked(const PlainType& kept, const Self&) {
    return kept;
  }

  static void release(SavedVariable& kept) { kept.reset_data(); }
  template <class T>
  static void release(T&) {}

  static void collect(torch::dynamo::autograd::CompiledNodeArgs& args, const SavedVariable& kept) {
    args.collect(kept, /*is_output=*/true);
  }
  template <class T>
  static void collect(torch::dynamo::autograd::CompiledNodeArgs& args, const T& kept) {
    args.collect(kept);
  }

  std::tuple<Kept<Argument>...> kept_;
};

template <class... Argument>
bool any_requires_grad(const std::tuple<Argument...>& arguments) {
  return std::apply([](const auto&... argument) { return torch::autograd::compute_requires_grad(argument...); },
                    arguments);
}

template <class... Argument>
edge_list edges_of(const std::tuple<Argument...>& arguments) {
  return std::apply([](const auto&... argument) { return torch::autograd::collect_next_edges(argument...); },
                    arguments);
}

inline void set_tangent(const at::Tensor& output, const at::Tensor& tangent) {
  if (tangent.defined()) output._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

// Gives `outputs` a history: the rule's gradients with respect to `edges`, computed from these arguments.
template <class Rule, class... Argument>
void record(const variable_list& outputs, edge_list edges, const Argument&... argument) {
  auto node = make_node<RuleNode<Rule>>();
  node->set_next_edges(std::move(edges));
  torch::autograd::set_history(outputs, node);
  detail::Flat<decltype(Rule::gradients)>::spread([&](const Request&, const auto&... flat) { node->keep(flat...); },
                                                  Request{outputs, {}}, argument...);
}

}  // namespace attention_ext
