// Rows of a tensor in shared memory, in chunks of 16 bytes that are permuted within each row so that eight rows of one
// column, or eight columns of one row, lie in different banks.
#pragma once

#include "core/varlen.h"
#include "gpu/warp/warp.h"

namespace attention_ext {
namespace {

template <class E, int kRowCount, int kWidth>
struct SharedTile {
  using Element = E;
  static constexpr int kRows = kRowCount, kColumns = kWidth;
  static constexpr int kChunk = 16 / sizeof(E);  // elements
  static constexpr int kChunks = kWidth / kChunk;
  static constexpr int kPeriod = kChunks < 8 ? kChunks : 8;
  static constexpr size_t kBytes = size_t{kRows} * kWidth * sizeof(E);

  E* data;

  ATTENTION_DEVICE E* at(int row, int column) const {
    const int chunk = column / kChunk ^ (row * kPeriod / 8 % kPeriod);
    return data + (row * kChunks + chunk) * kChunk + column % kChunk;
  }
};

// Rows of one head of a tensor, from row 0 of a sequence on.
template <class E>
struct Rows {
  E* data = nullptr;
  int64_t stride_row = 0, stride_col = 0;
  int columns = 0;

  ATTENTION_DEVICE E* row(int64_t i) const { return data + i * stride_row; }
  ATTENTION_DEVICE bool has_whole_chunks() const {
    constexpr int kChunk = 16 / sizeof(E);
    return stride_col == 1 && stride_row % kChunk == 0 && reinterpret_cast<uint64_t>(data) % 16 == 0;
  }
};

template <class E>
ATTENTION_DEVICE Rows<E> rows_of(const View& view, int64_t batch, int64_t head, int64_t first, int64_t columns) {
  if (!view) return {};
  E* data = static_cast<E*>(view.data) + batch * view.stride_b + head * view.stride_h + first * view.stride_row;
  return {data, view.stride_row, view.stride_col, static_cast<int>(columns)};
}

// Rows within a sequence, in fewer registers than a Range.
struct Span {
  int begin, end;
  ATTENTION_DEVICE explicit Span(Range range)
      : begin(static_cast<int>(range.begin)), end(static_cast<int>(range.end)) {}
  ATTENTION_DEVICE bool has(int i) const { return begin <= i && i < end; }
};

// Starts to fill a tile with rows first, first + 1, ...; rows outside `valid` and columns past the end are 0. The
// threads of the block share the work; the rows are there after wait_copies and a barrier.
template <int kThreads, class Tile, class E>
ATTENTION_DEVICE void copy_rows(const Tile& to, const Rows<E>& from, int first, Span valid) {
  // copy(chunk, source, count): of a chunk the first `count` elements are those at `source`. Not unrolled, as every
  // main loop contains this.
  const auto for_each_chunk = [&](auto&& copy) {
    ATTENTION_UNROLL_BY_1
    for (int i = thread_index(); i < Tile::kRows * Tile::kChunks; i += kThreads) {
      const int row = i / Tile::kChunks, column = i % Tile::kChunks * Tile::kChunk;
      const int room = minimum(from.columns - column, Tile::kChunk);
      const int count = valid.has(first + row) && room > 0 ? room : 0;
      copy(to.at(row, column), count > 0 ? from.row(first + row) + column * from.stride_col : from.data, count);
    }
  };
  if (from.has_whole_chunks()) {
    for_each_chunk(
        [](E* chunk, const E* source, int count) { copy_async(chunk, source, count * static_cast<int>(sizeof(E))); });
  } else {  // any strides, any alignment
    for_each_chunk([&](E* chunk, const E* source, int count) {
      for (int i = 0; i < Tile::kChunk; ++i) store_shared(chunk + i, i < count ? source[i * from.stride_col] : E{});
    });
  }
}

}  // namespace
}  // namespace attention_ext
