// How much a block of threads takes on, by dtype and head_dim: tiles that fit shared memory (163 KB from sm_80 on) and
// registers.
#pragma once

#include <type_traits>

#include "gpu/kernels/positions.h"

namespace attention_ext {
namespace {

// kDim: the bucket that head_dim and head_dim_v are padded to.
template <class C, int kDim>
struct Width {
  static constexpr bool kNarrow = sizeof(typename C::Element) == 2, kWide = sizeof(typename C::Element) == 8;
  static constexpr int kRowBytes = kDim * sizeof(typename C::Element);
  static constexpr int kRowRegisters = kDim * sizeof(typename C::Scalar) / 8;  // of a lane, for 16 rows of fragments
};

// A block of threads loops over tiles of kRows keys; a warp makes scores of kColumns of them at a time. But for float64
// beyond head_dim 128 a block fits the 99 KB of the smallest GPUs, and two of them the 227 KB of Hopper.
template <class C, int kDim, ScoreMode kMode>
struct ForwardShape : Width<C, kDim> {
  using Width<C, kDim>::kNarrow, Width<C, kDim>::kWide, Width<C, kDim>::kRowBytes;
  static constexpr int kWarps = kRowBytes <= 512 ? 4 : 2;
  static constexpr int kRowTiles =
      kNarrow && kDim <= 128 && kMode == ScoreMode::kMask ? 2 : 1;  // of 16 queries, a warp
  static constexpr int kQueries = kWarps * kRowTiles * kFragmentRows;
  static constexpr int kRows = kNarrow ? (kDim <= 128 ? 64 : 32) : kDim <= 64 ? 32 : 16;
  // The same for all modes: other blocks of keys would be summed in another order, so that dropout, which alone calls
  // for ScoreMode::kAll too, would change bits of logsumexp.
  static constexpr int kColumns = kWide || kRows < 32 ? 16 : kNarrow && kDim <= 128 ? kRows : 32;
  static constexpr bool kSplits = C::kSplits && kDim <= 128;
  static constexpr int kStages = kRowBytes <= 1024 ? 2 : 1;
};

// Of derivatives: gradients, or how gradients move along tangents of the inputs.
enum class Order : uint8_t { kFirst, kSecond };

// The widest rows of its own that a warp holds in registers, of 16-bit numbers: the more sums and mods there are, the
// less is left for them.
constexpr int widest_held(Order order, ScoreMode mode, bool owns_keys) {
  const bool mask = mode == ScoreMode::kMask;
  if (order == Order::kFirst) return mask ? 128 : owns_keys ? 64 : 96;
  if (owns_keys) return mask ? 64 : 32;
  return mask ? 128 : 0;
}

// A warp owns 16 queries or keys and loops over the others. With rows of up to 512 bytes (16-bit numbers, float32 to
// head_dim 128, float64 to 64) a block fits the smallest GPUs here too.
template <class C, int kDim, Order kOrder, ScoreMode kMode = ScoreMode::kAll, bool kOwnsKeys = false>
struct GradientShape : Width<C, kDim> {
  using Width<C, kDim>::kNarrow, Width<C, kDim>::kWide, Width<C, kDim>::kRowBytes, Width<C, kDim>::kRowRegisters;
  static constexpr bool kFirst = kOrder == Order::kFirst;
  static constexpr bool kHoldsOwn = kNarrow && kDim <= widest_held(kOrder, kMode, kOwnsKeys);
  static constexpr int kWarps = kRowBytes <= (kFirst ? 1024 : 256) ? 4 : !kFirst && kRowBytes <= 512 ? 2 : 1;
  static constexpr bool kFewRows = kRowBytes >= 512 || (kNarrow && !kFirst && kDim == 128 && !kHoldsOwn);
  static constexpr int kRows = kFewRows ? 16 : kNarrow && kRowBytes <= (kFirst ? 256 : 128) ? 64 : 32;
  static constexpr bool kFewColumns = kWide || kRows < 32 || (kFirst ? !kNarrow && kDim >= 128 : !kNarrow || kDim > 64);
  static constexpr int kColumns = kFewColumns ? 16 : 32;
  static constexpr bool kFewKeyColumns =
      kDim > 64 || C::kSplits || (!kFirst && kMode == ScoreMode::kAll);  // of both gradients
  static constexpr int kKeyColumns = kFewKeyColumns ? 16 : kColumns;
  static constexpr bool kSplits = C::kSplits && kFirst && kDim <= 128;
  static constexpr int kTwoStages = !kFirst ? (kNarrow ? 256 : 0) : kSplits ? 256 : 512;  // of bytes in a row
  static constexpr int kStages = kRowBytes <= kTwoStages ? 2 : 1;
  static constexpr bool kBothGradients = kRowRegisters <= 64;  // of keys and values at once
  static constexpr size_t kSharedBytesAllowed = kRowBytes <= 512 ? kFewSharedBytes : kMostSharedBytes;
};

// Buckets that head_dim and head_dim_v are padded to; the last one also takes what is wider.
template <int... kDims>
struct HeadDims {};

template <class C>
using FirstOrderDims = std::conditional_t<sizeof(typename C::Element) == 2, HeadDims<32, 64, 96, 128, 192, 256>,
                                          HeadDims<32, 64, 128, 256>>;

template <int kDim, int... kWider, class F>
KernelPlan with_dim(HeadDims<kDim, kWider...>, int64_t widest, F&& f) {
  if constexpr (sizeof...(kWider) > 0) {
    if (widest > kDim) return with_dim(HeadDims<kWider...>{}, widest, f);
  }
  return f(std::integral_constant<int, kDim>{});
}

// Calls f with the bucket of head_dim and head_dim_v and with the rules as constants.
template <class Dims = HeadDims<32, 64, 128, 256>, class F>
KernelPlan with_shape(const AttentionProblem& p, F&& f) {
  return with_dim(Dims{}, maximum(p.head_dim, p.head_dim_v), [&](auto dim) {
    if (score_mode_of(p) == ScoreMode::kMask) return f(dim, std::integral_constant<ScoreMode, ScoreMode::kMask>{});
    return f(dim, std::integral_constant<ScoreMode, ScoreMode::kAll>{});
  });
}

}  // namespace
}  // namespace attention_ext
