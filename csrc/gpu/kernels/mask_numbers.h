// Numbers of attn_mask, of the problem's own precision or narrower, as they are added to scores.
#pragma once

#include "gpu/kernels/products.h"

namespace attention_ext {
namespace {

template <class T>
ATTENTION_DEVICE T mask_number(bool x) {
  return x ? T(0) : -infinity<T>();
}
template <class T, class E>
ATTENTION_DEVICE T mask_number(E x) {
  return widen(x);
}

// f(E{}) for the dtype of a mask of a problem in T.
template <class T, class F>
ATTENTION_DEVICE auto with_mask_type(DType dtype, F&& f) {
  if (dtype == DType::kBool) return f(bool{});
  if constexpr (sizeof(T) == 8) {
    return f(double{});
  } else {
    if (dtype == DType::kBFloat16) return f(BFloat16{});
    if (dtype == DType::kFloat16) return f(Half{});
    return f(float{});
  }
}

template <class T>
ATTENTION_DEVICE T read_mask(const View& view, int64_t at) {
  return with_mask_type<T>(view.dtype,
                           [&]<class E>(E) { return mask_number<T>(static_cast<const E*>(view.data)[at]); });
}

// The part of a mask of one head that 16 rows of fragments cover: `row` and `column` are those of the first fragment,
// `stride_row` and `stride_column` go along fragments, which may be transposed. Nothing lies at or past the ends.
struct MaskPlace {
  int64_t offset, stride_row, stride_column;
  int row, column, end_row, end_column;
};

// The numbers of a lane, f(n, i, number); lanes beyond the ends repeat the first or last row or the last column.
// Neighbours in memory are read as pairs.
template <class T, int kTiles, class F>
ATTENTION_DEVICE void for_each_mask_number(const View& view, const MaskPlace& at, F&& f) {
  with_mask_type<T>(view.dtype, [&]<class E>(E) {
    struct alignas(2 * sizeof(E)) Pair {
      E number[2];
    };
    const E* rows[2];
    const int lane = reread_lane_index(), group = lane / 4, member = lane % 4;
    ATTENTION_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = maximum(0, minimum(at.row + r * 8 + group, at.end_row - 1));
      rows[r] = static_cast<const E*>(view.data) + at.offset + row * at.stride_row;
    }
    const int first = at.column + 2 * member;
    const bool even = (at.offset | at.stride_row) % 2 == 0 && reinterpret_cast<uint64_t>(view.data) % sizeof(Pair) == 0;
    if (at.stride_column == 1 && even && at.column + kTiles * kFragmentColumns <= at.end_column) {
      ATTENTION_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        ATTENTION_UNROLL
        for (int r = 0; r < 2; ++r) {
          const auto pair = *reinterpret_cast<const Pair*>(rows[r] + first + n * kFragmentColumns);
          f(n, 2 * r, mask_number<T>(pair.number[0]));
          f(n, 2 * r + 1, mask_number<T>(pair.number[1]));
        }
      }
    } else {
      for_each_number<kTiles>([&](int n, int i) {
        const int column = minimum(first + n * kFragmentColumns + i % 2, at.end_column - 1);
        f(n, i, mask_number<T>(rows[i / 2][column * at.stride_column]));
      });
    }
  });
}

}  // namespace
}  // namespace attention_ext
