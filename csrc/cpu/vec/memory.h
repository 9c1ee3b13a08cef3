// Vectors of the accumulate type from and to memory of any dtype.
#pragma once

#include <type_traits>

#include "core/problem.h"
#include "cpu/vec/math.h"

namespace attention_ext {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <int kBytes>
using HalfWidthWords = typename VectorOf<uint16_t, kBytes / 2>::Unaligned;

ATTENTION_INLINE F32 load_as(const float* from) { return load(from); }
ATTENTION_INLINE F64 load_as(const double* from) { return load(from); }
ATTENTION_INLINE F32 load_as(const Half* from) { return load_half(&from->bits); }
ATTENTION_INLINE F32 load_as(const BFloat16* from) {
  const auto words = *reinterpret_cast<const HalfWidthWords<kVectorBytes>*>(from);
  return bit_cast<F32>(__builtin_convertvector(words, U32) << 16);
}

ATTENTION_INLINE void store_as(float* to, F32 v) { store(to, v); }
ATTENTION_INLINE void store_as(double* to, F64 v) { store(to, v); }
ATTENTION_INLINE void store_as(Half* to, F32 v) { store_half(&to->bits, v); }
ATTENTION_INLINE void store_as(BFloat16* to, F32 v) {
  const U32 bits = bit_cast<U32>(v);
  U32 rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);                           // to nearest even
  rounded = (bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits | 0x400000u) : rounded;  // a NaN stays one
  *reinterpret_cast<HalfWidthWords<kVectorBytes>*>(to) =
      __builtin_convertvector(rounded >> 16, VectorOf<uint16_t, kVectorBytes / 2>::Type);
}

// The first `count` lanes; the others are 0.
template <class T, class Source>
ATTENTION_INLINE Vec<T> load_first(const Source* from, int64_t count) {
  if (count >= kLanes<T>) return load_as(from);
  Source some[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = from[i];
  return load_as(some);
}

template <class T, class Target>
ATTENTION_INLINE void store_first(Target* to, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) return store_as(to, v);
  Target all[kLanes<T>];
  store_as(all, v);
  for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

// The first `count` numbers `stride` apart.
template <class T, class Source>
ATTENTION_INLINE Vec<T> load_strided(const Source* from, int64_t stride, int64_t count) {
  if (stride == 1) return load_first<T>(from, count);
  Source some[kLanes<T>] = {};
  for (int64_t i = 0; i < minimum<int64_t>(count, kLanes<T>); ++i) some[i] = from[i * stride];
  return load_as(some);
}

template <class T, class Target>
ATTENTION_INLINE void store_strided(Target* to, int64_t stride, Vec<T> v, int64_t count) {
  if (stride == 1) return store_first<T>(to, v, count);
  Target all[kLanes<T>];
  store_as(all, v);
  for (int64_t i = 0; i < minimum<int64_t>(count, kLanes<T>); ++i) to[i * stride] = all[i];
}

// Calls f(column, count) for each vector of a row; count is a constant where the vector is whole.
template <class T, class F>
ATTENTION_INLINE void for_each_vector_of_row(int64_t columns, F&& f) {
  int64_t c = 0;
  for (; c + kLanes<T> <= columns; c += kLanes<T>) f(c, std::integral_constant<int64_t, kLanes<T>>{});
  if (c < columns) f(c, columns - c);
}

// attn_mask as it is added to a score: the number itself, or 0 and -inf for true and false.
template <class T, class Source>
ATTENTION_INLINE Vec<T> load_mask(const Source* from, int64_t stride, int64_t count) {
  return load_strided<T>(from, stride, count);
}
template <class T>
ATTENTION_INLINE Vec<T> load_mask(const bool* from, int64_t stride, int64_t count) {
  using Bytes = VectorOf<uint8_t, kLanes<T>>;
  alignas(kLanes<T>) uint8_t some[kLanes<T>] = {};
  if (stride == 1 && count >= kLanes<T>) {
    __builtin_memcpy(some, from, kLanes<T>);
  } else {
    for (int64_t i = 0; i < minimum<int64_t>(count, kLanes<T>); ++i) some[i] = from[i * stride];
  }
  const auto bytes = *reinterpret_cast<const typename Bytes::Unaligned*>(some);
  const auto flags = __builtin_convertvector(bytes, decltype(Vec<T>{} < Vec<T>{}));
  return flags != 0 ? Vec<T>{} : splat<T>(static_cast<T>(-__builtin_inf()));
}

// Calls f with a null pointer of the storage type behind a dtype that accumulates in T.
template <class T, class F>
ATTENTION_INLINE void with_storage(DType dtype, F&& f) {
  if constexpr (sizeof(T) == 8) {
    f(static_cast<double*>(nullptr));
  } else {
    switch (dtype) {
      case DType::kBFloat16:
        return f(static_cast<BFloat16*>(nullptr));
      case DType::kFloat16:
        return f(static_cast<Half*>(nullptr));
      default:
        return f(static_cast<float*>(nullptr));
    }
  }
}

// The same for attn_mask, which may be bool too.
template <class T, class F>
ATTENTION_INLINE void with_mask_storage(DType dtype, F&& f) {
  if (dtype == DType::kBool) return f(static_cast<bool*>(nullptr));
  with_storage<T>(dtype, f);
}

}  // namespace
}  // namespace attention_ext
