// Rows of a tensor in shared memory, in chunks of 16 bytes. Within each row the chunks of every period of up to eight
// are permuted, by an exclusive or with the row, so that eight rows of one column, or eight columns of one row, lie in
// different banks.
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
  static constexpr int kPeriod = kChunks % 8 == 0 ? 8 : kChunks & -kChunks;
  static constexpr int kRowBytes = kWidth * sizeof(E);
  static constexpr size_t kBytes = size_t{kRows} * kRowBytes;

  E* data;

  ATTENTION_DEVICE static SharedTile in(char* memory) { return {reinterpret_cast<E*>(memory)}; }

  ATTENTION_DEVICE E* at(int row, int column) const {
    const int chunk = column / kChunk ^ permutation(row);
    return data + (row * kChunks + chunk) * kChunk + column % kChunk;
  }

  // The address of row + lane_row and column + lane_column; row is a multiple of 8, lane_row below 16, and column a
  // multiple of a power of two that is above lane_column. What a lane adds is the same all over the tile, so that most
  // of this is constant.
  ATTENTION_DEVICE SharedAddress address_of(int row, int lane_row, int column, int lane_column) const {
    const int own = lane_row * kRowBytes + (lane_column / kChunk ^ permutation(lane_row)) * 16 +
                    lane_column % kChunk * static_cast<int>(sizeof(E));
    const auto chunk = static_cast<SharedAddress>(column / kChunk);
    return ((shared_address(data) + static_cast<SharedAddress>(own)) ^ (chunk % kPeriod * 16)) +
           chunk / kPeriod * (kPeriod * 16) + static_cast<SharedAddress>(row * kRowBytes);
  }
  ATTENTION_DEVICE SharedAddress chunk_at(int row, int lane_row, int column, int lane_chunk) const {
    return address_of(row, lane_row, column, lane_chunk * kChunk);
  }

 private:
  ATTENTION_DEVICE static int permutation(int row) { return row * kPeriod / 8 % kPeriod; }
};

// Neighbours in a row, of which an even column comes first, or every fourth.
template <class E, int kCount>
struct alignas(kCount * sizeof(E)) Neighbours {
  E number[kCount];
};
template <class E>
using Pair = Neighbours<E, 2>;

// Rows of one head of a tensor, from row 0 of a sequence on.
template <class E>
struct Rows {
  E* data = nullptr;
  int64_t stride_row = 0, stride_col = 0;
  int columns = 0;
  int whole_chunks = 0;  // whether every row is; not tested anew for every tile

  Rows() = default;
  ATTENTION_DEVICE Rows(E* first, int64_t row_stride, int64_t col_stride, int64_t column_count)
      : data(first), stride_row(row_stride), stride_col(col_stride), columns(static_cast<int>(column_count)) {
    constexpr int kChunk = 16 / sizeof(E);
    whole_chunks =
        in_register(stride_col == 1 && stride_row % kChunk == 0 && reinterpret_cast<uint64_t>(data) % 16 == 0);
  }
  ATTENTION_DEVICE E* row(int64_t i) const { return data + i * stride_row; }
};

template <class E>
ATTENTION_DEVICE Rows<E> rows_of(const View& view, int64_t batch, int64_t head, int64_t first, int64_t columns) {
  if (!view) return {};
  E* data = static_cast<E*>(view.data) + batch * view.stride_b + head * view.stride_h + first * view.stride_row;
  return {data, view.stride_row, view.stride_col, columns};
}

// Rows within a sequence, in fewer registers than a Range.
struct Span {
  int begin, end;
  ATTENTION_DEVICE explicit Span(Range range)
      : begin(static_cast<int>(range.begin)), end(static_cast<int>(range.end)) {}
  ATTENTION_DEVICE Range range() const { return {begin, end}; }
  ATTENTION_DEVICE bool has(int i) const { return begin <= i && i < end; }
  ATTENTION_DEVICE bool covers(int first, int count) const { return begin <= first && first + count <= end; }
};

// The bytes of a chunk that lie within the columns.
template <class E>
ATTENTION_DEVICE int bytes_within(int columns, int column) {
  constexpr int kChunk = 16 / sizeof(E);
  return maximum(0, minimum(columns - column, kChunk)) * static_cast<int>(sizeof(E));
}

// copy_rows where all rows are valid: a thread has a period's chunk of every kDown-th row, and steps from one to the
// next.
template <int kDown, class Tile, class E>
ATTENTION_DEVICE void copy_whole_rows(const Tile& to, const Rows<E>& from, int first) {
  constexpr int kAcross = Tile::kPeriod, kPeriods = Tile::kChunks / kAcross, kStep = kAcross * Tile::kChunk;
  const int thread = reread_thread_index(), row = thread / kAcross, column = thread % kAcross * Tile::kChunk;
  const E* source = from.row(first + row) + column;
  const SharedAddress target = shared_address(to.at(row, column));
  int bytes[kPeriods];
  ATTENTION_UNROLL
  for (int i = 0; i < kPeriods; ++i) bytes[i] = bytes_within<E>(from.columns, column + i * kStep);
  ATTENTION_UNROLL
  for (int r = 0; r < Tile::kRows; r += kDown) {
    ATTENTION_UNROLL
    for (int i = 0; i < kPeriods; ++i) {
      copy_async(target + static_cast<SharedAddress>(r * Tile::kRowBytes + i * kAcross * 16), source + i * kStep,
                 bytes[i]);
    }
    source += kDown * from.stride_row;
  }
}

// Starts to fill a tile with rows first, first + 1, ...; rows outside `valid`, a Span or SeenRows, and columns past the
// end are 0. The threads of the block share the work; the rows are there after wait_copies and a barrier.
template <int kThreads, class Tile, class E, class Valid>
ATTENTION_DEVICE void copy_rows(const Tile& to, const Rows<E>& from, int first, const Valid& valid) {
  constexpr int kDown = kThreads / Tile::kPeriod;
  const bool whole_chunks = from.whole_chunks != 0;
  if constexpr (kDown % 8 == 0 && Tile::kRows % kDown == 0) {
    if (whole_chunks && valid.covers(first, Tile::kRows)) {
      return copy_whole_rows<kDown>(to, from, first);
    }
  }
  // Not unrolled, as every main loop contains this.
  ATTENTION_UNROLL_BY(1)
  for (int i = reread_thread_index(); i < Tile::kRows * Tile::kChunks; i += kThreads) {
    const int row = i / Tile::kChunks, column = i % Tile::kChunks * Tile::kChunk;
    const int bytes = valid.has(first + row) ? bytes_within<E>(from.columns, column) : 0;
    const E* source = bytes > 0 ? from.row(first + row) + column * from.stride_col : from.data;
    E* chunk = to.at(row, column);
    if (whole_chunks) {
      copy_async(shared_address(chunk), source, bytes);
    } else {  // any strides, any alignment
      const int count = bytes / static_cast<int>(sizeof(E));
      for (int n = 0; n < Tile::kChunk; ++n) store_shared(chunk + n, n < count ? source[n * from.stride_col] : E{});
    }
  }
}

}  // namespace
}  // namespace attention_ext
