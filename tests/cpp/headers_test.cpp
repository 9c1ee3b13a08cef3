// csrc/core against brute force: visible keys, block masks, packed sequences; Philox against its published vectors.
#include "check.h"
#include "core/score_mods.h"
#include "scalar_words.h"

namespace attention_ext::test {

namespace {

void test_philox() {
  const auto zero = philox<ScalarWords, uint32_t>({0, 0}, 0, 0, 0, 0);
  const uint32_t of_zero[] = {0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48};
  const auto ones = philox<ScalarWords, uint32_t>({~0u, ~0u}, ~0u, ~0u, ~0u, ~0u);
  const uint32_t of_ones[] = {0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662};
  for (int i = 0; i < 4; ++i) {
    check(zero.word[i] == of_zero[i], "philox of zeros");
    check(ones.word[i] == of_ones[i], "philox of ones");
  }
  for (int64_t k = 0; k < 16; ++k) {
    check(philox_bits(zero, k) == ((of_zero[k % 8 / 2] >> (k % 2 == 1 ? 16 : 0)) & 0xFFFF), "philox bits of a key");
  }
  check(dropout_threshold(0.0) == 0 && dropout_threshold(1.0) == 65536 && dropout_threshold(0.3) == 19661, "threshold");
  check(dropout_threshold(1.0 - 1e-9) == 65535 && dropout_scale(65535) == 65536.0 && dropout_scale(65536) == 0.0 &&
            dropout_scale(0) == 1.0 && dropout_scale(16384) == 1.0 / 0.75,
        "dropout scale");
}

bool sees(const AttentionProblem& p, int64_t q, int64_t k, int64_t length_q, int64_t length_k) {
  const int64_t diagonal = q + p.query_offset - p.key_offset + (p.bottom_right ? length_k - length_q : 0);
  return k < length_k && k >= diagonal - p.window_left && k <= diagonal + p.window_right;
}

// On a GPU key_lengths and cu_seqlens are not validated: any values must give ranges within the tensors.
void test_invalid_lengths() {
  const int64_t invalid[] = {INT64_MIN, -1, 0, 3, 7, 8, INT64_MAX};
  for (const int64_t first : invalid) {
    for (const int64_t second : invalid) {
      const int64_t cu_seqlens[] = {first, second};
      AttentionProblem p;
      p.seqlen_q = p.seqlen_k = 7;
      p.max_seqlen_q = p.max_seqlen_k = 4;
      p.key_lengths = &second;
      const Sequence dense = sequence_of(p, 0);
      check(dense.length_k >= 0 && dense.length_k <= 7, "a key length stays within the keys");
      p.key_lengths = nullptr;
      p.cu_seqlens_q = p.cu_seqlens_k = cu_seqlens;
      const Sequence s = sequence_of(p, 0);
      check(s.begin_q >= 0 && s.length_q >= 0 && s.begin_q + s.length_q <= 7, "a sequence stays within the tensor");
      check(s.length_q <= 4 && s.length_k <= 4, "a sequence is no longer than the longest");
    }
  }
}

// block_mask and visible_keys agree with the mask of each pair, for every block of a small problem.
void check_blocks(const AttentionProblem& p) {
  const Sequence s = sequence_of(p, 0);
  const Band band{p.window_left, p.window_right};
  const bool banded = p.window_left < kUnlimited || p.window_right < kUnlimited;
  for (int64_t q0 = 0; q0 < p.seqlen_q; ++q0) {
    for (int64_t q1 = q0 + 1; q1 <= p.seqlen_q; ++q1) {
      const Range keys = visible_keys(p, s, {q0, q1});
      check(keys.begin >= 0 && keys.end >= keys.begin, "visible_keys is a range");
      for (int64_t k = 0; k < p.seqlen_k; ++k) {
        bool seen = false;
        for (int64_t q = q0; q < q1; ++q) seen = seen || sees(p, q, k, p.seqlen_q, s.length_k);
        check(!seen || (k >= keys.begin && k < keys.end), "visible_keys contains every visible key");
        check(seen || k < keys.begin || k >= keys.end || !banded || q1 - q0 > 1 || k >= s.length_k,
              "visible_keys of one query contains no other key");
      }
      for (int64_t k0 = 0; k0 < s.length_k; ++k0) {
        for (int64_t k1 = k0 + 1; k1 <= s.length_k; ++k1) {
          int64_t seen = 0;
          for (int64_t q = q0; q < q1; ++q) {
            for (int64_t k = k0; k < k1; ++k) seen += sees(p, q, k, p.seqlen_q, s.length_k) ? 1 : 0;
          }
          const BlockMask block = band.block_mask({q0, q1}, {k0, k1}, s.diagonal);
          check(block != BlockMask::kEmpty || seen == 0, "an empty block has no visible pair");
          check((block == BlockMask::kFull) == (seen == (q1 - q0) * (k1 - k0)), "a full block has only visible pairs");
        }
      }
    }
  }
}

void test_blocks() {
  const int64_t lengths[] = {4};
  for (const int64_t left : {int64_t{0}, int64_t{2}, kUnlimited}) {
    for (const int64_t right : {int64_t{0}, int64_t{1}, kUnlimited}) {
      for (const bool bottom_right : {false, true}) {
        for (const bool key_lengths : {false, true}) {
          AttentionProblem p;
          p.batch = 1;
          p.seqlen_q = 5;
          p.seqlen_k = 7;
          p.window_left = left;
          p.window_right = right;
          p.bottom_right = bottom_right;
          p.key_lengths = key_lengths ? lengths : nullptr;
          check_blocks(p);
          p.query_offset = 2;
          check_blocks(p);
          p.key_offset = 3;
          check_blocks(p);
        }
      }
    }
  }
}

// The ranges of a sparse mask, against its bits one by one.
void test_sparse_mask() {
  constexpr int64_t kQueries = 5, kKeys = 30;
  const int32_t blocks[] = {0,           kEmptyBlock, kFullBlock,  kEmptyBlock,  // head 0, queries 0 and 1
                            1,           kEmptyBlock, kEmptyBlock, kFullBlock,   // queries 2 and 3
                            kEmptyBlock, kEmptyBlock, kEmptyBlock, 2,            // query 4
                            kFullBlock,  kFullBlock,  1,           kEmptyBlock,  // head 1
                            kEmptyBlock, kEmptyBlock, kEmptyBlock, kEmptyBlock, 2, 0, kFullBlock, kEmptyBlock};
  const uint8_t bits[] = {0x0F, 0x81, 0x00, 0x7E, 0x55, 0xAA};
  const SparseMask mask{blocks, 0, 12, 4, bits, 2, 8, 3};
  const auto sees_key = [&](int64_t h, int64_t q, int64_t k) {
    const int32_t block = blocks[h * 12 + q / 2 * 4 + k / 8];
    return block < 0 ? block == kFullBlock : (bits[block * 2 + q % 2] >> (k % 8) & 1) != 0;
  };
  const auto shows_block = [&](Range heads, Range q, int64_t k) {
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      for (int64_t i = q.begin; i < q.end; ++i) {
        if (blocks[h * 12 + i / 2 * 4 + k / 8] != kEmptyBlock) return true;
      }
    }
    return false;
  };
  for (int64_t q0 = 0; q0 < kQueries; ++q0) {
    for (int64_t k0 = 0; k0 < kKeys; ++k0) {
      for (int64_t k1 = k0 + 1; k1 <= kKeys; ++k1) {
        for (int64_t h = 0; h < 2; ++h) {
          const uint64_t found = mask.visible_bits(0, h, q0, {k0, k1});
          for (int64_t k = k0; k < k1; ++k) {
            check(((found >> (k - k0)) & 1) == (sees_key(h, q0, k) ? 1u : 0u), "visible_bits");
          }
        }
        for (int64_t q1 = q0 + 1; q1 <= kQueries; ++q1) {
          for (const Range heads : {Range{0, 1}, Range{1, 2}, Range{0, 2}}) {
            Range run{k1, k1}, hull{};
            for (int64_t k = k1 - 1; k >= k0; --k) {
              if (!shows_block(heads, {q0, q1}, k)) continue;
              run = {k, shows_block(heads, {q0, q1}, k + 1) && k + 1 < k1 ? run.end : k + 1};
              hull = {k, hull.empty() ? k + 1 : hull.end};
            }
            const Range got_run = mask.first_run(0, heads, {q0, q1}, {k0, k1});
            const Range got_hull = mask.hull(0, heads, {q0, q1}, {k0, k1});
            check(got_run.empty() == run.empty() && (run.empty() || got_run.begin == run.begin), "a run begins");
            check(got_run.end == run.end, "a run ends, where there is none at the end");
            check(got_hull.empty() == hull.empty(), "a hull is empty");
            check(hull.empty() || (got_hull.begin == hull.begin && got_hull.end == hull.end), "a hull");
          }
        }
      }
    }
  }
  check(mask.block_mask(0, 0, {0, 2}, {16, 24}) == BlockMask::kFull, "a full block");
  check(mask.block_mask(0, 0, {0, 2}, {8, 16}) == BlockMask::kEmpty, "an empty block");
  check(mask.block_mask(0, 0, {0, 4}, {16, 24}) == BlockMask::kPartial, "a full and an empty block");
  check(mask.block_mask(0, 0, {0, 1}, {0, 8}) == BlockMask::kPartial, "a block of bits");
  check(mask.is_full(0, {1, 2}, {0, 2}, {0, 16}), "full blocks");
  check(!mask.is_full(0, {0, 2}, {0, 2}, {0, 16}), "full blocks of one head alone");
  SparseMask unchecked = mask;
  unchecked.partial = 2;
  check(unchecked.octet(0, 0, 4, 24) == 0 && mask.octet(0, 0, 4, 24) == 0x55, "a block beyond those that exist");
}

void test_packed_sequences() {
  const int64_t cu_seqlens_q[] = {0, 3, 3, 8}, cu_seqlens_k[] = {0, 0, 4, 6};
  AttentionProblem p;
  p.batch = 3;
  p.seqlen_q = p.max_seqlen_q = 8;
  p.seqlen_k = p.max_seqlen_k = 6;
  p.cu_seqlens_q = cu_seqlens_q;
  p.cu_seqlens_k = cu_seqlens_k;
  p.bottom_right = true;
  const Sequence last = sequence_of(p, 2);
  check(last.tensor_batch == 0 && last.batch == 2 && last.begin_q == 3 && last.begin_k == 4, "where a sequence begins");
  check(last.length_q == 5 && last.length_k == 2 && last.diagonal == -3, "how long a sequence is");
  check(sequence_of(p, 1).length_q == 0 && sequence_of(p, 0).length_k == 0, "an empty sequence");
}

}  // namespace

void test_headers() {
  test_philox();
  test_invalid_lengths();
  test_blocks();
  test_sparse_mask();
  test_packed_sequences();
}

}  // namespace attention_ext::test
