// attn_mask and the sparse mask of a block, as (key, query) numbers that are added to scores.
#pragma once

#include "cpu/kernels/tile.h"

namespace attention_ext {
namespace {

struct Staged {
  BlockMask mask;  // of the keys below
  Range visible;   // keys between the first and the last that any query sees, in whole groups of lanes
};

// The attn_mask of a block as (key, query) numbers, 0 and -inf for a bool one; and whether the block is full with it.
template <class T, class Storage>
Staged stage_mask(const Storage* mask, int64_t stride_q, int64_t stride_k, Range q, Range k, Matrix<T> to) {
  using Mask = decltype(Vec<T>{} < Vec<T>{});
  const Vec<T> hidden = splat<T>(static_cast<T>(-__builtin_inf()));
  const int64_t vectors = ceil_div(q.size(), kLanes<T>);
  Staged staged{BlockMask::kFull, {k.begin, k.begin}};
  for (int64_t k0 = k.begin; k0 < k.end; k0 += kLanes<T>) {
    const int64_t count = minimum<int64_t>(kLanes<T>, k.end - k0);
    Mask visible{}, changed{};
    for (int64_t v = 0; v < (stride_q == 0 ? 1 : vectors); ++v) {
      Vec<T> block[kLanes<T>];
      if (stride_q == 0) {
        const Vec<T> row = load_mask<T>(mask + k0 * stride_k, stride_k, count);
        unroll<kLanes<T>>(UNROLLED(i) { block[i] = splat<T>(row[i()]); });
      } else {
        const int64_t first = q.begin + v * kLanes<T>;
        const Storage* from = mask + first * stride_q + k0 * stride_k;
        if (stride_k == 1 && count == kLanes<T> && first + kLanes<T> <= q.end) {
          unroll<kLanes<T>>(UNROLLED(i) { block[i] = load_mask<T>(from + i * stride_q, 1, kLanes<T>); });
        } else {
          unroll<kLanes<T>>(UNROLLED(i) {  // lanes past the end repeat the last query
            const int64_t row = minimum<int64_t>(i, q.end - 1 - first);
            block[i] = load_mask<T>(from + row * stride_q, stride_k, count);
          });
        }
        transpose(block);
      }
      unroll<kLanes<T>>(UNROLLED(i) {
        if (i < count) {
          visible |= block[i] != hidden;
          changed |= block[i] != Vec<T>{};
          T* row = to.row(k0 + i - k.begin) + v * kLanes<T>;
          store(row, block[i]);
          if (stride_q == 0) {
            for (int64_t other = 1; other < vectors; ++other) store(row + other * kLanes<T>, block[i]);
          }
        }
      });
    }
    if (!any_lane(visible)) continue;
    if (staged.visible.empty()) staged.visible.begin = k0;
    const bool gap = !staged.visible.empty() && staged.visible.end != k0;
    if (gap || any_lane(changed)) staged.mask = BlockMask::kPartial;
    staged.visible.end = k0 + count;
  }
  if (staged.visible.empty()) staged.mask = BlockMask::kEmpty;
  return staged;
}

template <class T>
Staged stage_mask(const View& mask, const Tile& tile, Range k, Matrix<T> to) {
  const char* data = source_of(mask, tile.sequence.batch, tile.head, 0).data;
  Staged staged{};
  with_mask_storage<T>(mask.dtype, [&](auto* storage) __attribute__((always_inline)) {
    staged = stage_mask<T>(reinterpret_cast<decltype(storage)>(const_cast<char*>(data)), mask.stride_row,
                           mask.stride_col, tile.q, k, to);
  });
  return staged;
}

// Bits of keys, a query per lane.
template <class T>
using KeyBits = Vec<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>>;

// The queries of a vector in a sparse mask, which mostly lie in one row of blocks.
struct SparseRows {
  const int32_t* blocks;
  int64_t row;  // within the block
  bool in_one_block;
};

// Eight keys of `key_block`, from a byte of its bits on. Lanes past the end repeat the last query.
template <class T>
ATTENTION_INLINE KeyBits<T> load_octet(const SparseMask& mask, const Tile& tile, int64_t vector, const SparseRows& rows,
                                       int64_t key_block, int64_t byte) {
  using Word = std::decay_t<decltype(KeyBits<T>{}[0])>;
  const int64_t first = tile.q.begin + vector * kLanes<T>, last = minimum<int64_t>(kLanes<T>, tile.q.end - first) - 1;
  alignas(64) Word words[kLanes<T>];
  if (rows.in_one_block) {
    const int32_t block = rows.blocks[key_block];
    if (block < 0) return splat<Word>(block == kFullBlock ? 0xFF : 0);
    const uint8_t* from = mask.bits_of(block, rows.row, byte);
    for (int64_t i = 0; i < kLanes<T>; ++i) words[i] = from[minimum(i, last) * (mask.block_k / kKeysPerByte)];
  } else {
    const int64_t key = key_block * mask.block_k + byte * kKeysPerByte;
    for (int64_t i = 0; i < kLanes<T>; ++i) {
      words[i] = mask.octet(tile.sequence.batch, tile.head, first + minimum(i, last), key);
    }
  }
  return load(words);
}

// The sparse mask of a block: what it hides becomes -inf in `to`, all else 0, or stays if `adds`. Of a full block
// nothing is written.
template <class T>
Staged stage_sparse(const SparseMask& mask, const Tile& tile, Range k, bool adds, Matrix<T> to) {
  using Bits = KeyBits<T>;
  using Word = std::decay_t<decltype(Bits{}[0])>;
  const int64_t b = tile.sequence.batch, h = tile.head;
  if (const BlockMask all = mask.block_mask(b, h, tile.q, k); all == BlockMask::kFull) return {all, k};
  SparseRows rows[kQueryVectors];
  for (int64_t v = 0; v < tile.vectors; ++v) {
    const int64_t first = tile.q.begin + v * kLanes<T>, last = minimum(first + kLanes<T>, tile.q.end) - 1;
    const int64_t block = first / mask.block_q;
    rows[v] = {mask.row(b, h, block), first % mask.block_q, last < (block + 1) * mask.block_q};
  }
  const Vec<T> hidden = splat<T>(static_cast<T>(-__builtin_inf()));
  Staged staged{BlockMask::kFull, {k.begin, k.begin}};
  int64_t key_block = k.begin / mask.block_k;
  for (int64_t octet = k.begin / kKeysPerByte * kKeysPerByte; octet < k.end; octet += kKeysPerByte) {
    if (octet == (key_block + 1) * mask.block_k) ++key_block;
    const int64_t byte = (octet - key_block * mask.block_k) / kKeysPerByte;
    const Range keys{maximum(octet, k.begin), minimum(octet + kKeysPerByte, k.end)};
    const Bits wanted = splat<Word>(((1 << keys.size()) - 1) << (keys.begin - octet));
    Bits shown{}, missing{};
    for (int64_t v = 0; v < tile.vectors; ++v) {
      const Bits bits = load_octet<T>(mask, tile, v, rows[v], key_block, byte);
      shown |= bits & wanted;
      missing |= ~bits & wanted;
      for (int64_t key = keys.begin; key < keys.end; ++key) {
        T* lanes = to.row(key - k.begin) + v * kLanes<T>;
        store(lanes, (bits & splat<Word>(1 << (key - octet))) != 0 ? (adds ? load(lanes) : Vec<T>{}) : hidden);
      }
    }
    if (!any_lane(shown)) continue;
    if (staged.visible.empty()) staged.visible = {keys.begin, keys.begin};
    if (staged.visible.end != keys.begin || any_lane(missing)) staged.mask = BlockMask::kPartial;
    staged.visible.end = keys.end;
  }
  if (staged.visible.empty()) staged.mask = BlockMask::kEmpty;
  return staged;
}

// Of attn_mask or its gradient, keys k of the queries after a tile.
ATTENTION_INLINE RowsAhead next_mask_rows(const View& mask, const Tile& tile, Range k) {
  if (!mask || mask.stride_row == 0) return {};
  const Source rows = source_of(mask, tile.sequence.batch, tile.head, tile.q.end);
  return {columns_from(rows, k.begin), minimum(tile.q.size(), tile.sequence.length_q - tile.q.end), k.size()};
}

}  // namespace
}  // namespace attention_ext
