// The arguments that all operators share. In C++ they are spelled here and in the schema text, nowhere else.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

namespace attention_ext {

// score = softcap * tanh(scale * query . key / softcap) + attn_mask - alibi_slope * |diagonal - k|, then hidden keys.
struct AttentionOptions {
  std::optional<at::Tensor> attn_mask;  // broadcast to (batch, heads, seqlen_q, seqlen_k); bool (true: attend) or added
  double dropout_p = 0.0;
  bool is_causal = false;
  std::optional<double> scale;                           // none: 1 / sqrt(head_dim)
  bool enable_gqa = false;                               // allows heads to be a multiple of kv_heads
  std::string_view causal_alignment = "top_left";        // or "bottom_right": the corner that the diagonal goes through
  std::optional<c10::SymInt> window_left, window_right;  // keys from diagonal - left to diagonal + right
  double softcap = 0.0;                                  // 0: none
  std::optional<at::Tensor> alibi_slopes;                // (heads,) or (batch, heads)
  std::optional<at::Tensor> sinks;        // (heads,) or (batch, heads): a logit that joins the normaliser
  std::optional<at::Tensor> key_lengths;  // (batch,)
  std::optional<at::Tensor> cu_seqlens_q, cu_seqlens_k;  // (sequences + 1,), with batch 1 and sequences packed
  c10::SymInt query_offset = 0;  // of a shard of longer sequences: the position of its first query
  c10::SymInt key_offset = 0;    // likewise of its first key
  // Broadcasts to (batch, heads, query blocks, key blocks), int32: -1 where a block is empty, -2 where it is full, else
  // which of block_mask_bits (partial blocks, block_q, block_k / 8), uint8, it has: the lowest bit is the first key's.
  std::optional<at::Tensor> block_mask, block_mask_bits;

  auto fields() const {
    return std::tie(attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment, window_left, window_right,
                    softcap, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k, query_offset, key_offset,
                    block_mask, block_mask_bits);
  }

  // Those that have gradients and tangents, in the order in which the operators list them.
  auto differentiable() const { return std::tie(attn_mask, alibi_slopes, sinks); }
  auto differentiable() { return std::tie(attn_mask, alibi_slopes, sinks); }
};

}  // namespace attention_ext
