// Why a kernel does not serve a problem, for the rows of both tables.
#pragma once

#include "core/problem.h"

namespace attention_ext {

constexpr int64_t kMostHeadDim = 256;

inline const char* not_in_buckets(const AttentionProblem& p) {
  return maximum(p.head_dim, p.head_dim_v) > kMostHeadDim ? "serves head_dim and head_dim_v up to 256" : nullptr;
}

}  // namespace attention_ext
