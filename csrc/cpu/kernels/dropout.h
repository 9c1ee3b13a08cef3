// Dropout of a block of weights, by core's Philox bits.
#pragma once

#include <type_traits>

#include "core/dropout.h"
#include "cpu/kernels/tile.h"

namespace attention_ext {
namespace {

// Lanes of T from as many 16-bit numbers held in 32-bit words: true where the weight is kept.
template <class T>
ATTENTION_INLINE auto kept_lanes(const uint32_t* bits, uint32_t threshold) {
  using Words = VectorOf<uint32_t, kLanes<T> * 4>;
  using Wide = VectorOf<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>>;
  const auto words = *reinterpret_cast<const typename Words::Unaligned*>(bits);
  return __builtin_convertvector(words, typename Wide::Type) >= static_cast<int>(threshold);
}

// Calls f(row, lane, kept) for every vector of the block; kept is a mask over its lanes, or just true without dropout.
template <class T, class F>
ATTENTION_INLINE void for_each_vector(const Dropout& dropout, const Tile& tile, Range k, F&& f) {
  if (!dropout.present) {
    for (int64_t r = 0; r < k.size(); ++r) {
      for (int64_t lane = 0; lane < tile.vectors * kLanes<T>; lane += kLanes<T>) f(r, lane, std::true_type{});
    }
    return;
  }
  const uint32_t batch_head = dropout.batch_head(tile.sequence.batch, tile.head);
  const int64_t words = ceil_div(tile.vectors * kLanes<T>, kLanes<uint32_t>);
  alignas(64) uint32_t bits[kKeysPerPhilox][kQueries<float>];
  const int64_t begin = k.begin + dropout.first_key, end = k.end + dropout.first_key;
  for (int64_t octet = begin / kKeysPerPhilox; octet * kKeysPerPhilox < end; ++octet) {
    for (int64_t w = 0; w < words; ++w) {
      const U32 q = iota<uint32_t>() + static_cast<uint32_t>(tile.q.begin + w * kLanes<uint32_t>);
      const auto random = dropout.words<WordOps>(q, static_cast<uint32_t>(octet), batch_head);
      unroll<kKeysPerPhilox>(UNROLLED(j) { store(bits[j] + w * kLanes<uint32_t>, philox_bits(random, j)); });
    }
    const int64_t first = maximum(begin, octet * kKeysPerPhilox), last = minimum(end, (octet + 1) * kKeysPerPhilox);
    for (int64_t key = first; key < last; ++key) {
      for (int64_t v = 0; v < tile.vectors; ++v) {
        const int64_t lane = v * kLanes<T>;
        f(key - begin, lane, kept_lanes<T>(bits[key % kKeysPerPhilox] + lane, dropout.threshold));
      }
    }
  }
}

// Sets dropped weights to 0; the caller scales the kept ones.
template <class T>
void drop(const Dropout& dropout, const Tile& tile, Range k, Matrix<T> weight) {
  for_each_vector<T>(dropout, tile, k, [&](int64_t row, int64_t lane, auto kept) __attribute__((always_inline)) {
    T* lanes = weight.row(row) + lane;
    store(lanes, kept ? load(lanes) : Vec<T>{});
  });
}

}  // namespace
}  // namespace attention_ext
