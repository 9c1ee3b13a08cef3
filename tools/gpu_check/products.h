// Matrix products of one warp each, whose results show how the accumulator rounds; on a GPU or emulated.
#pragma once

#include "gpu/warp/warp.h"

namespace attention_ext {
namespace {

// c (16 x 8) += a (16 x 16) b (16 x 8) in floats that E has
template <class E>
ATTENTION_DEVICE void multiply(E, const float* a, const float* b, float* c) {
  const int group = thread_index() / 4, member = thread_index() % 4;
  uint32_t a_pairs[4], b_pairs[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    const float* pair = a + (group + i % 2 * 8) * 16 + member * 2 + i / 2 * 8;
    a_pairs[i] = narrow_pair(E{}, pair[0], pair[1]);
    sums[i] = c[(group + i / 2 * 8) * 8 + member * 2 + i % 2];
  }
  for (int i = 0; i < 2; ++i) {
    const float* pair = b + (member * 2 + i * 8) * 8 + group;
    b_pairs[i] = narrow_pair(E{}, pair[0], pair[8]);
  }
  multiply_16x8x16(E{}, sums, a_pairs, b_pairs);
  for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + member * 2 + i % 2] = sums[i];
}

// c (16 x 8) += a (16 x 8) b (8 x 8) in floats that TF32 has
ATTENTION_DEVICE void multiply(float, const float* a, const float* b, float* c) {
  const int group = thread_index() / 4, member = thread_index() % 4;
  uint32_t a_bits[4], b_bits[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    a_bits[i] = bits_of(a[(group + i % 2 * 8) * 8 + member + i / 2 * 4]);
    sums[i] = c[(group + i / 2 * 8) * 8 + member * 2 + i % 2];
  }
  for (int i = 0; i < 2; ++i) b_bits[i] = bits_of(b[(member + i * 4) * 8 + group]);
  multiply_16x8x8(sums, a_bits, b_bits);
  for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + member * 2 + i % 2] = sums[i];
}

// Number `index` of many.
ATTENTION_DEVICE void multiply_one(int bytes, bool is_bfloat16, int64_t index, const float* a, const float* b,
                                   float* c) {
  const int64_t depth = bytes == 2 ? 16 : 8;
  a += index * 16 * depth;
  b += index * depth * 8;
  c += index * 16 * 8;
  if (bytes == 4) {
    multiply(float{}, a, b, c);
  } else if (is_bfloat16) {
    multiply(BFloat16{}, a, b, c);
  } else {
    multiply(Half{}, a, b, c);
  }
}

}  // namespace
}  // namespace attention_ext
