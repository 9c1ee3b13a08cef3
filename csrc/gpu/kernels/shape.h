// How much a block of threads takes on, by dtype and head_dim: tiles that fit shared memory (163 KB from sm_80 on) and
// registers.
#pragma once

#include <type_traits>

#include "gpu/kernels/positions.h"

namespace attention_ext {
namespace {

// kDim: the bucket that head_dim and head_dim_v are padded to.
template <class C, int kDim>
struct ForwardShape {
  static constexpr bool kNarrow = sizeof(typename C::Element) == 2;
  static constexpr int kWarps = 4;
  static constexpr int kRowTiles = kNarrow && kDim <= 128 ? 2 : 1;  // of 16 queries, a warp
  static constexpr int kKeys = kNarrow ? 64 : kDim <= 64 ? 32 : 16;
  static constexpr int kStages = 2;
};

template <class C, int kDim>
struct BackwardShape {
  static constexpr bool kNarrow = sizeof(typename C::Element) == 2;
  static constexpr int kWarps = 4;
  static constexpr int kRowTiles = 1;
  static constexpr int kColumns = kNarrow ? (kDim <= 128 ? 64 : 32) : kDim <= 64 ? 32 : 16;  // of the block walked over
  static constexpr int kStages = 2;
};

// Calls f with the bucket of head_dim and head_dim_v and with the rules as constants.
template <class F>
KernelPlan with_shape(const AttentionProblem& p, F&& f) {
  const int64_t widest = maximum(p.head_dim, p.head_dim_v);
  const auto with_rules = [&](auto dim) {
    if (rules_of(p) == Rules::kBand) return f(dim, std::integral_constant<Rules, Rules::kBand>{});
    return f(dim, std::integral_constant<Rules, Rules::kAll>{});
  };
  if (widest <= 32) return with_rules(std::integral_constant<int, 32>{});
  if (widest <= 64) return with_rules(std::integral_constant<int, 64>{});
  if (widest <= 128) return with_rules(std::integral_constant<int, 128>{});
  return with_rules(std::integral_constant<int, 256>{});
}

}  // namespace
}  // namespace attention_ext
