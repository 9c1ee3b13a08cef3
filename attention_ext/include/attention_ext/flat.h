// Functions of structs, as torch's dispatcher sees them: it knows arguments only one by one. A struct whose fields()
// ties its members is a bundle; wherever a function takes one, its operator takes the members in that order.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

namespace attention_ext {

namespace detail {

template <class... T>
struct Types {};

template <class... A, class... B>
Types<A..., B...> operator+(Types<A...>, Types<B...>);

template <class T, class = void>
struct Bundle : std::false_type {
  using Arguments = Types<T>;
  static constexpr size_t kWidth = 1;
};

// The dispatcher's argument type for a member: tensors by reference, numbers by value.
template <class Member>
using MemberArgument = std::conditional_t<std::is_same_v<Member, std::optional<at::Tensor>>, const Member&, Member>;

template <class... Member>
Types<MemberArgument<Member>...> arguments_of(const std::tuple<const Member&...>&);

template <class T>
struct Bundle<T, std::void_t<decltype(std::declval<T>().fields())>> : std::true_type {
  using Fields = decltype(std::declval<T>().fields());
  using Arguments = decltype(arguments_of(std::declval<Fields>()));
  static constexpr size_t kWidth = std::tuple_size_v<Fields>;
};

template <class Result, class FlatTypes, class... Argument>
struct FlatAs;

template <class Result, class... FlatArgument, class... Argument>
struct FlatAs<Result, Types<FlatArgument...>, Argument...> {
  using Signature = Result(FlatArgument...);

  template <Result (*function)(Argument...)>
  static Result kernel(FlatArgument... flat) {
    return gather<function>(std::forward_as_tuple(flat...), std::index_sequence_for<Argument...>());
  }

  // Calls flat(every argument, every member of a bundle).
  template <class Callable>
  static decltype(auto) spread(const Callable& flat, const std::decay_t<Argument>&... argument) {
    return std::apply(flat, std::tuple_cat(members(argument)...));
  }

 private:
  static constexpr size_t offset_of(size_t argument) {
    const size_t widths[] = {Bundle<Argument>::kWidth...};
    size_t offset = 0;
    for (size_t i = 0; i < argument; ++i) offset += widths[i];
    return offset;
  }

  template <Result (*function)(Argument...), class Tuple, size_t... i>
  static Result gather(const Tuple& flat, std::index_sequence<i...>) {
    return function(take<Argument, offset_of(i)>(flat, std::make_index_sequence<Bundle<Argument>::kWidth>())...);
  }

  template <class T, size_t offset, class Tuple, size_t... i>
  static decltype(auto) take(const Tuple& flat, std::index_sequence<i...>) {
    if constexpr (Bundle<T>::value) {
      return std::decay_t<T>{std::get<offset + i>(flat)...};
    } else {
      return std::get<offset>(flat);
    }
  }

  template <class T>
  static auto members(const T& argument) {
    if constexpr (Bundle<const T&>::value) {
      return argument.fields();
    } else {
      return std::tuple<const T&>(argument);
    }
  }
};

template <class Function>
struct Flat;
template <class Result, class... Argument>
struct Flat<Result(Argument...)>
    : FlatAs<Result, decltype((Types<>() + ... + typename Bundle<Argument>::Arguments())), Argument...> {};

}  // namespace detail

// The flat form of a function, for m.impl().
template <auto function>  // NOLINTNEXTLINE(readability-identifier-naming): it is called like a function
constexpr auto* flat_kernel = &detail::Flat<std::remove_pointer_t<decltype(function)>>::template kernel<function>;

// An operator by name, called as Function is.
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
