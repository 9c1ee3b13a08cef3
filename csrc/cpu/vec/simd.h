// One vector register of T, on GCC's and clang's vector extensions. Included by a unit of csrc/cpu/isa after it has
// opened its target and defined kVectorBytes; operations without such an extension (fma, max, conversions) are in this
// folder's file of the instruction set. Everything here is local to the unit, so that no function of one instruction
// set serves another.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/numeric.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vector arguments: every function that takes one is inlined
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace attention_ext {
namespace {

template <class T, int kBytes = kVectorBytes>
struct VectorOf {
  using Type [[gnu::vector_size(kBytes)]] = T;
  using Unaligned [[gnu::vector_size(kBytes), gnu::aligned(alignof(T)), gnu::may_alias]] = T;
};

template <class T>
using Vec = typename VectorOf<T>::Type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

using F32 = Vec<float>;
using F64 = Vec<double>;
using I32 = Vec<int32_t>;
using U32 = Vec<uint32_t>;
using U64 = Vec<uint64_t>;

template <class F, int... kIndex>
ATTENTION_INLINE void unroll_each(F&& f, std::integer_sequence<int, kIndex...>) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}

// f(0) ... f(n - 1) with constant indices: GCC keeps arrays of vectors in registers only when no index is a variable.
template <int kCount, class F>
ATTENTION_INLINE void unroll(F&& f) {
  unroll_each(f, std::make_integer_sequence<int, kCount>{});
}

#define UNROLLED(index) [&](auto index) __attribute__((always_inline))

template <class T>
ATTENTION_INLINE Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::Unaligned*>(from);
}

template <class T>
ATTENTION_INLINE void store(T* to, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::Unaligned*>(to) = v;
}

template <class T>
ATTENTION_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <class To, class From>
ATTENTION_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return reinterpret_cast<To>(from);
}

template <int kStep, class V, int... kLane>
ATTENTION_INLINE V swap_lanes(V v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kStep)...);
}

template <class T, int kStep = 1>
ATTENTION_INLINE T sum_lanes(Vec<T> v) {
  if constexpr (kStep < kLanes<T>) {
    return sum_lanes<T, 2 * kStep>(v + swap_lanes<kStep>(v, std::make_integer_sequence<int, kLanes<T>>{}));
  } else {
    return v[0];
  }
}

template <class T, int kStep = 1>
ATTENTION_INLINE T max_lanes(Vec<T> v) {
  if constexpr (kStep < kLanes<T>) {
    const Vec<T> swapped = swap_lanes<kStep>(v, std::make_integer_sequence<int, kLanes<T>>{});
    return max_lanes<T, 2 * kStep>(v > swapped ? v : swapped);
  } else {
    return v[0];
  }
}

// Whether a comparison holds in any lane.
template <class Mask>
ATTENTION_INLINE bool any_lane(Mask mask) {
  const U64 words = bit_cast<U64>(mask);
  uint64_t any = 0;
  for (int i = 0; i < kLanes<uint64_t>; ++i) any |= words[i];
  return any != 0;
}

// 0, 1, 2, ...
template <class T>
ATTENTION_INLINE Vec<T> iota() {
  Vec<T> v{};
  for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(i);
  return v;
}

template <int kStep, bool kSecond, class V, int... kLane>
ATTENTION_INLINE V exchange(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  if constexpr (kSecond) {
    return __builtin_shufflevector(a, b, ((kLane & kStep) ? kCount + kLane : kLane + kStep)...);
  } else {
    return __builtin_shufflevector(a, b, ((kLane & kStep) ? kCount + kLane - kStep : kLane)...);
  }
}

template <int kStep, class V, int kCount>
ATTENTION_INLINE void transpose_step(V (&rows)[kCount]) {
  if constexpr (kStep < kCount) {
    unroll<kCount>(UNROLLED(i) {
      if constexpr ((i & kStep) == 0) {
        const V a = rows[i], b = rows[i + kStep];
        rows[i] = exchange<kStep, false>(a, b, std::make_integer_sequence<int, kCount>{});
        rows[i + kStep] = exchange<kStep, true>(a, b, std::make_integer_sequence<int, kCount>{});
      }
    });
    transpose_step<2 * kStep>(rows);
  }
}

// Lane j of row i changes places with lane i of row j.
template <class V, int kCount>
ATTENTION_INLINE void transpose(V (&rows)[kCount]) {
  transpose_step<1>(rows);
}

// Lane i becomes the sum of all lanes of row i, added up as sum_lanes does.
template <int kStep = 1, class V, int kCount>
ATTENTION_INLINE V sum_each(V (&rows)[kCount]) {
  if constexpr (kStep < kCount) {
    unroll<kCount>(UNROLLED(i) {
      if constexpr (i % (2 * kStep) == 0) {
        constexpr auto kAll = std::make_integer_sequence<int, kCount>{};
        const V a = rows[i], b = rows[i + kStep];
        rows[i] = exchange<kStep, false>(a, b, kAll) + exchange<kStep, true>(a, b, kAll);
      }
    });
    return sum_each<2 * kStep>(rows);
  } else {
    return rows[0];
  }
}

}  // namespace
}  // namespace attention_ext
