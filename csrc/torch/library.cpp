// The schema of every operator, and nothing else. attention, scaled_dot_product_attention and attention_weights take
// any number of leading dimensions (composite.cpp), the others the shapes that kernels take. Conventions:
//   query (B, Hq, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), out (B, Hq, Lq, Dv) with (B, Lq, Hq, Dv) memory,
//   logsumexp (B, Hq, Lq) in float32, or float64 for float64;
//   rng_state int64 [seed, offset], empty without dropout; as an argument of attention: none draws one from the
//   generator, a given one repeats its bits and is returned as a copy; [seed, offset, first, heads] for a shard of the
//   heads: head h of batch entry b has the bits of number first + b * heads + h;
//   with cu_seqlens B is 1 and lengths are totals over sequences packed end to end;
//   tangents and gradients, in order: query, key, value, attn_mask, alibi_slopes, sinks;
//   a gradient that output_mask does not ask for, or of an input that has none, is an empty (0,) tensor; likewise
//   out_tangent without compute_out_tangent.
// The options are positional because torch's register_vmap refuses operators with keyword-only tensors.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

// Read from the file by attention_ext/ops/library.py where it does not load.
extern "C" const char* const kAttentionExtBuiltFor = "attention_ext was built for torch " TORCH_VERSION;

namespace attention_ext {

namespace {

const std::string kOptions =
    "Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, float? scale=None, bool enable_gqa=False, "
    "str causal_alignment=\"top_left\", SymInt? window_left=None, SymInt? window_right=None, float softcap=0.0, "
    "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? key_lengths=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, SymInt query_offset=0, SymInt key_offset=0, Tensor? block_mask=None, "
    "Tensor? block_mask_bits=None";

const std::string kTangents =
    "Tensor? query_tangent, Tensor? key_tangent, Tensor? value_tangent, Tensor? attn_mask_tangent, "
    "Tensor? alibi_slopes_tangent, Tensor? sinks_tangent";

const std::string kOutputMask = "bool[6] output_mask=[True, True, True, True, True, True]";

const std::string kGradients =
    "Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_attn_mask, Tensor grad_alibi_slopes, "
    "Tensor grad_sinks";

}  // namespace

TORCH_LIBRARY(attention_ext, m) {
  // Outputs do not depend on input strides, but speed does: compilers keep the order of dimensions in memory.
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag, at::Tag::needs_fixed_stride_order};
  const auto define = [&](const std::string& schema) { m.def(schema.c_str(), tags); };
  const auto define_random = [&](const std::string& schema) {
    std::vector<at::Tag> all(tags);
    all.push_back(at::Tag::nondeterministic_seeded);
    // TorchScript merges equal calls of an operator, unless it has side effects.
    m.def(torch::schema(schema.c_str(), c10::AliasAnalysisKind::CONSERVATIVE), std::as_const(all));
  };

  const std::string forward = "(Tensor query, Tensor key, Tensor value, " + kOptions +
                              ", Tensor? rng_state=None) -> (Tensor out, Tensor logsumexp, Tensor rng_state)";
  define_random("attention" + forward);
  define_random("attention_forward" + forward);
  // attention with the arguments and the result of torch's function: torch spends time on each that a schema has.
  define_random(
      "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
      "float dropout_p=0.0, bool is_causal=False, float? scale=None, bool enable_gqa=False) -> Tensor");

  define(
      "attention_backward(Tensor grad_out, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor logsumexp, Tensor rng_state, " +
      kOptions + ", " + kOutputMask + ") -> (" + kGradients + ")");

  define("attention_jvp(Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor rng_state, " +
         kTangents + ", " + kOptions + ") -> (Tensor out_tangent, Tensor logsumexp_tangent)");

  define("attention_double_backward(" + kTangents +
         ", Tensor grad_out, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, Tensor out, "
         "Tensor logsumexp, Tensor rng_state, " +
         kOptions + ", " + kOutputMask +
         ", bool compute_out_tangent=True) -> (Tensor out_tangent, Tensor logsumexp_tangent, " + kGradients + ")");

  // (B, Hq, rows, Lk), or (B, rows, Lk) with average_heads, in the dtype of query
  const std::string weights =
      kOptions + ", bool average_heads=False, SymInt? row_begin=None, SymInt? row_end=None) -> Tensor";
  define("attention_weights(Tensor query, Tensor key, Tensor? logsumexp=None, Tensor? rng_state=None, " + weights);
  define("attention_weights_forward(Tensor query, Tensor key, Tensor logsumexp, Tensor rng_state, " + weights);

  // score_mod: the key of a compiled function, which reads the captured tensors; gradients in the order of query, key,
  // value, captured, of which wanted[i] asks for that of captured[i]
  define(
      "flex_attention_forward(Tensor query, Tensor key, Tensor value, str score_mod, Tensor[] captured, "
      "bool compute_max_scores, " +
      kOptions + ") -> (Tensor out, Tensor logsumexp, Tensor max_scores)");
  define(
      "flex_attention_backward(Tensor grad_out, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor logsumexp, str score_mod, Tensor[] captured, bool[] wanted, " +
      kOptions + ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor[] grad_captured)");

  // which: "forward", "backward", "weights", "jvp" or "double_backward"
  define("attention_explain(Tensor query, Tensor key, Tensor value, " + kOptions + ", str which=\"forward\") -> str");
}

}  // namespace attention_ext
