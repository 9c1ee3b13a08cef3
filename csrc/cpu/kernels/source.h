// Where a matrix lies in a tensor, and how its rows are brought near before they are needed.
#pragma once

#include "core/problem.h"
#include "cpu/vec/memory.h"

namespace attention_ext {
namespace {

// A matrix of a tensor: element (row, column) at data[row * stride_row + column * stride_col] of `dtype`.
struct Source {
  const char* data;
  DType dtype;
  int64_t stride_row, stride_col;
};

// Rows from `row` on of the head's matrix.
ATTENTION_INLINE Source source_of(const View& view, int64_t b, int64_t h, int64_t row) {
  const int64_t offset = b * view.stride_b + h * view.stride_h + row * view.stride_row;
  return {static_cast<const char*>(view.data) + offset * size_of(view.dtype), view.dtype, view.stride_row,
          view.stride_col};
}

// The rows from `first` on.
ATTENTION_INLINE Source rows_from(const Source& from, int64_t first) {
  return {from.data + first * from.stride_row * size_of(from.dtype), from.dtype, from.stride_row, from.stride_col};
}

// The columns from `first` on.
ATTENTION_INLINE Source columns_from(const Source& from, int64_t first) {
  return {from.data + first * from.stride_col * size_of(from.dtype), from.dtype, from.stride_row, from.stride_col};
}

// Rows of (batch, length, heads, head_dim) memory lie pages apart, where the hardware does not see them coming: loops
// over rows fetch that many ahead.
constexpr int64_t kRowsAhead = 8;

// Rows on their way from memory while products of others run, a few lines at each of their steps: a burst of lines
// would hold up the products instead. Rows that will be written count too, as a line is read before.
class RowsAhead {
 public:
  RowsAhead() = default;
  RowsAhead(const Source& from, int64_t rows, int64_t columns)
      : row_(from.data),
        row_bytes_(from.stride_col == 1 ? columns * size_of(from.dtype) : 0),
        stride_bytes_(from.stride_row * size_of(from.dtype)),
        rows_(row_bytes_ > 0 ? maximum<int64_t>(rows, 0) : 0) {}

  RowsAhead in_steps(int64_t steps) const {
    RowsAhead ahead = *this;
    if (rows_ == 0) return ahead;
    ahead.lines_a_step_ = ceil_div(rows_ * ceil_div(row_bytes_, kLineBytes), maximum<int64_t>(steps, 1));
    return ahead;
  }

  ATTENTION_INLINE void step() {
    for (int64_t line = 0; line < lines_a_step_ && rows_ > 0; ++line) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += kLineBytes;
      if (at_ >= row_bytes_) {
        at_ = 0;
        row_ += stride_bytes_;
        --rows_;
      }
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  const char* row_ = nullptr;
  int64_t row_bytes_ = 0, stride_bytes_ = 0, rows_ = 0, lines_a_step_ = 0, at_ = 0;
};

}  // namespace
}  // namespace attention_ext
