#include "call.h"

#include <algorithm>

#include "scalar_words.h"

namespace attention_ext::test {

namespace {

constexpr int64_t kSequences = 3;

// The mask of extra_mask.h, in a build that lists it.
bool extra_mask_hides(int64_t distance) {
#ifdef ATTENTION_EXT_EXTRA_MASK
  return (distance >= -30 && distance <= -8) || distance >= 20;
#else
  return distance == kUnlimited;
#endif
}

// cu_seqlens: sequence 1 has no query, the last one no key.
int64_t cu_seqlen(int64_t total, int64_t sequences, int64_t i, bool of_keys) {
  if (i >= sequences) return total;
  if (of_keys) return i == sequences - 1 ? total : i * total / 3;
  return i == 0 ? 0 : total / 2;
}

// Of the sparse mask: every third block is empty, every third full, and those between have bits.
BlockMask block_at(int64_t h, int64_t query_block, int64_t key_block) {
  return static_cast<BlockMask>((query_block + 2 * key_block + h) % 3);
}
bool bit_at(int64_t h, int64_t q, int64_t k) { return (q * 7 + k * 5 + h) % 4 != 0; }

bool blocks_hide(const Case& c, int64_t h, int64_t q, int64_t k) {
  if (c.block_q == 0) return false;
  const BlockMask block = block_at(h, q / c.block_q, k / c.block_k);
  return block == BlockMask::kEmpty || (block == BlockMask::kPartial && !bit_at(h, q, k));
}

int64_t value_at(const Guarded& memory, int64_t i) { return static_cast<const int64_t*>(memory.data())[i]; }

double number_at(const Guarded& memory, int64_t i) { return static_cast<const double*>(memory.data())[i]; }

// The view of a mask's gradient or tangent, broadcast like the mask.
View like_mask(const Array& array, const View& mask) {
  View view = array.view;
  view.stride_b = mask.stride_b;
  if (mask.stride_row == 0) view.stride_row = 0;
  if (mask.stride_col == 0) view.stride_col = 0;
  return view;
}

}  // namespace

Call::Call(const Case& c, DType type)
    : spec(c),
      dtype(type),
      query(type, c.batch, c.heads, c.seqlen_q, c.head_dim, c.heads_last),
      key(type, c.batch, c.kv_heads, c.seqlen_k, c.head_dim, c.heads_last),
      value(type, c.batch, c.kv_heads, c.seqlen_k, c.head_dim_v, c.heads_last),
      out(type, c.batch, c.heads, c.seqlen_q, c.head_dim_v, true),
      grad_out(type, c.batch, c.heads, c.seqlen_q, c.head_dim_v, c.heads_last),
      grad_query(type, c.batch, c.heads, c.seqlen_q, c.head_dim, true),
      grad_key(type, c.batch, c.kv_heads, c.seqlen_k, c.head_dim, true),
      grad_value(type, c.batch, c.kv_heads, c.seqlen_k, c.head_dim_v, true),
      logsumexp(accumulate_type(type), c.batch, c.heads, c.seqlen_q, 1),
      logsumexp_low(accumulate_type(type), c.batch, c.heads, c.seqlen_q, 1),
      grad_logsumexp(accumulate_type(type), c.batch, c.heads, c.seqlen_q, 1),
      weights(type, c.batch, c.heads, c.seqlen_q, c.seqlen_k),
      mean_weights(type, c.batch, 1, c.seqlen_q, c.seqlen_k),
      query_tangent(type, c.batch, c.heads, c.seqlen_q, c.head_dim),
      key_tangent(type, c.batch, c.kv_heads, c.seqlen_k, c.head_dim, c.heads_last),
      value_tangent(type, c.batch, c.kv_heads, c.seqlen_k, c.head_dim_v),
      out_tangent(type, c.batch, c.heads, c.seqlen_q, c.head_dim_v, true),
      logsumexp_tangent(accumulate_type(type), c.batch, c.heads, c.seqlen_q, 1),
      blocks(static_cast<size_t>(c.heads * query_blocks() * key_blocks()) * 4),
      bits(static_cast<size_t>(c.heads * query_blocks() * key_blocks() * c.block_q * c.block_k / 8)),
      slopes(static_cast<size_t>(c.heads) * 8),
      sinks(static_cast<size_t>(c.heads) * 8),
      lengths(static_cast<size_t>(c.batch) * 8),
      cu_seqlens_q((kSequences + 1) * 8),
      cu_seqlens_k((kSequences + 1) * 8),
      rng_state(16),
      grad_slopes(static_cast<size_t>(sequences() * c.heads) * 8),
      grad_sinks(static_cast<size_t>(sequences() * c.heads) * 8),
      slopes_tangent(static_cast<size_t>(sequences() * c.heads) * 8),
      sinks_tangent(static_cast<size_t>(sequences() * c.heads) * 8) {
  std::mt19937 random(static_cast<unsigned>(c.seqlen_q * 131 + c.seqlen_k * 7 + c.head_dim));
  std::normal_distribution<double> normal;
  const auto draw = [&] { return normal(random); };
  for (Array* array :
       {&query, &key, &value, &grad_out, &grad_logsumexp, &query_tangent, &key_tangent, &value_tangent}) {
    array->fill(draw);
  }
  if (c.mask != Mask::kNone) {
    const int64_t rows = c.mask == Mask::kFloatPerKey ? 1 : c.seqlen_q,
                  columns = c.mask == Mask::kFloatPerQuery ? 1 : c.seqlen_k;
    const DType kind = c.mask == Mask::kBool ? DType::kBool : type;
    mask.emplace(kind, 1, c.heads, rows, columns);
    mask->fill([&] {
      const double x = draw();
      return c.mask == Mask::kBool ? static_cast<double>(x > -0.5) : x < -1 ? -INFINITY : x;
    });
    grad_mask.emplace(accumulate_type(type), 1, c.heads, rows, columns);
    if (kind != DType::kBool) {
      mask_tangent.emplace(type, 1, c.heads, rows, columns);
      mask_tangent->fill(draw);
    }
  }
  for (int64_t i = 0; i < sequences() * c.heads; ++i) {  // equal in each sequence, since slopes and sinks are shared
    static_cast<double*>(slopes_tangent.data())[i] = c.slope / 2 * static_cast<double>(i % c.heads + 1);
    static_cast<double*>(sinks_tangent.data())[i] = 0.7 - static_cast<double>(i % c.heads);
  }
  for (int64_t h = 0; h < c.heads; ++h) {
    static_cast<double*>(slopes.data())[h] = c.slope * static_cast<double>(h + 1);
    static_cast<double*>(sinks.data())[h] = draw();
  }
  for (int64_t b = 0; b < c.batch; ++b) static_cast<int64_t*>(lengths.data())[b] = b == 0 ? c.seqlen_k * 2 / 3 : b - 1;
  for (int64_t i = 0; i <= kSequences; ++i) {
    static_cast<int64_t*>(cu_seqlens_q.data())[i] = cu_seqlen(c.seqlen_q, kSequences, i, false);
    static_cast<int64_t*>(cu_seqlens_k.data())[i] = cu_seqlen(c.seqlen_k, kSequences, i, true);
  }
  fill_blocks();
  if (c.key_lengths || c.poisoned_from < c.seqlen_k) poison_keys();
  static_cast<int64_t*>(rng_state.data())[0] = 0x123456789ABCDEF;
  static_cast<int64_t*>(rng_state.data())[1] = 42;
}

// The bits of each block lie at its number, those of empty and full blocks unused. Beyond the lengths they are set.
void Call::fill_blocks() {
  auto* numbers = static_cast<int32_t*>(blocks.data());
  auto* bytes = static_cast<uint8_t*>(bits.data());
  int32_t number = 0;
  for (int64_t h = 0; h < spec.heads; ++h) {
    for (int64_t i = 0; i < query_blocks(); ++i) {
      for (int64_t j = 0; j < key_blocks(); ++j, ++number) {
        const BlockMask block = block_at(h, i, j);
        numbers[number] = block == BlockMask::kEmpty ? kEmptyBlock : block == BlockMask::kFull ? kFullBlock : number;
        for (int64_t q = i * spec.block_q; block == BlockMask::kPartial && q < (i + 1) * spec.block_q; ++q) {
          for (int64_t k = j * spec.block_k; k < (j + 1) * spec.block_k; ++k) {
            const int64_t bit = ((number * spec.block_q + q % spec.block_q) * spec.block_k) + k % spec.block_k;
            if (!bit_at(h, q, k)) bytes[bit / 8] &= static_cast<uint8_t>(~(1U << (bit % 8)));
          }
        }
      }
    }
  }
}

void Call::poison_keys() {
  for (int64_t b = 0; b < spec.batch; ++b) {
    for (int64_t h = 0; h < spec.kv_heads; ++h) {
      for (int64_t k = spec.key_lengths ? value_at(lengths, b) : spec.poisoned_from; k < spec.seqlen_k; ++k) {
        for (int64_t d = 0; d < spec.head_dim; ++d) key.set(b, h, k, d, NAN);
        for (int64_t d = 0; d < spec.head_dim_v; ++d) value.set(b, h, k, d, NAN);
      }
    }
  }
}

void Call::fill(AttentionProblem& p) const {
  const auto* cu_seqlens = static_cast<const int64_t*>(cu_seqlens_q.data());
  p.batch = spec.varlen ? kSequences : spec.batch;
  p.heads = spec.heads;
  p.kv_heads = spec.kv_heads;
  p.seqlen_q = p.max_seqlen_q = spec.seqlen_q;
  p.seqlen_k = p.max_seqlen_k = spec.seqlen_k;
  p.head_dim = spec.head_dim;
  p.head_dim_v = spec.head_dim_v;
  p.dtype = dtype;
  p.query = query.view;
  p.key = key.view;
  p.value = value.view;
  if (mask) {
    p.attn_mask = mask->view;
    p.attn_mask.stride_b = 0;
    if (mask->sizes[2] == 1) p.attn_mask.stride_row = 0;
    if (mask->sizes[3] == 1) p.attn_mask.stride_col = 0;
  }
  if (spec.block_q > 0) {
    p.sparse_mask = {static_cast<const int32_t*>(blocks.data()),
                     0,
                     query_blocks() * key_blocks(),
                     key_blocks(),
                     static_cast<const uint8_t*>(bits.data()),
                     spec.block_q,
                     spec.block_k,
                     spec.heads * query_blocks() * key_blocks()};
  }
  if (spec.alibi) p.alibi_slopes = static_cast<const double*>(slopes.data());
  if (spec.sinks) p.sinks = static_cast<const double*>(sinks.data());
  if (spec.key_lengths) p.key_lengths = static_cast<const int64_t*>(lengths.data());
  if (spec.varlen) {
    p.cu_seqlens_q = cu_seqlens;
    p.cu_seqlens_k = static_cast<const int64_t*>(cu_seqlens_k.data());
    p.max_seqlen_q = p.max_seqlen_k = 0;
    for (int64_t i = 0; i < kSequences; ++i) {
      p.max_seqlen_q = std::max(p.max_seqlen_q, p.cu_seqlens_q[i + 1] - p.cu_seqlens_q[i]);
      p.max_seqlen_k = std::max(p.max_seqlen_k, p.cu_seqlens_k[i + 1] - p.cu_seqlens_k[i]);
    }
  }
  p.scale = spec.scale;
  p.softcap = spec.softcap;
  p.window_left = spec.window_left;
  p.window_right = spec.window_right;
  p.bottom_right = spec.bottom_right;
  p.query_offset = spec.query_offset;
  p.key_offset = spec.key_offset;
  p.dropout_p = spec.dropout_p;
  if (spec.dropout_p > 0) p.rng_state = static_cast<const int64_t*>(rng_state.data());
}

int64_t Call::sequences() const { return spec.varlen ? kSequences : spec.batch; }

void Call::fill(BackwardProblem& p) {
  fill(static_cast<AttentionProblem&>(p));
  p.out = out.view;
  p.grad_out = grad_out.view;
  p.logsumexp = logsumexp.view.data;
  p.logsumexp_low = logsumexp_low.view.data;
  p.grad_logsumexp = grad_logsumexp.view.data;
  p.grad_query = grad_query.view;
  p.grad_key = grad_key.view;
  p.grad_value = grad_value.view;
  if (mask_tangent) {
    p.grad_attn_mask = like_mask(*grad_mask, p.attn_mask);
    grad_mask->fill([] { return 0.0; });
  }
  if (spec.alibi) p.grad_alibi_slopes = static_cast<double*>(grad_slopes.data());
  if (spec.sinks) p.grad_sinks = static_cast<double*>(grad_sinks.data());
}

Tangents Call::tangents() const {
  AttentionProblem p;
  fill(p);
  Tangents t;
  t.query = query_tangent.view;
  t.key = key_tangent.view;
  t.value = value_tangent.view;
  if (mask_tangent) t.attn_mask = like_mask(*mask_tangent, p.attn_mask);
  if (spec.alibi) t.alibi_slopes = static_cast<const double*>(slopes_tangent.data());
  if (spec.sinks) t.sinks = static_cast<const double*>(sinks_tangent.data());
  return t;
}

ForwardProblem Call::forward() const {
  ForwardProblem p;
  fill(p);
  p.out = out.view;
  p.logsumexp = logsumexp.view.data;
  p.logsumexp_low = logsumexp_low.view.data;
  return p;
}

BackwardProblem Call::backward() {
  BackwardProblem p;
  fill(p);
  return p;
}

WeightsProblem Call::weights_problem(bool average_heads) const {
  WeightsProblem p;
  fill(p);
  p.logsumexp = logsumexp.view.data;
  p.logsumexp_low = logsumexp_low.view.data;
  p.weights = average_heads ? mean_weights.view : weights.view;
  p.average_heads = average_heads;
  p.row_end = spec.seqlen_q;
  return p;
}

JvpProblem Call::jvp() const {
  JvpProblem p;
  fill(p);
  p.out = out.view;
  p.logsumexp = logsumexp.view.data;
  p.logsumexp_low = logsumexp_low.view.data;
  p.tangent = tangents();
  p.out_tangent = out_tangent.view;
  p.logsumexp_tangent = logsumexp_tangent.view.data;
  return p;
}

DoubleBackwardProblem Call::double_backward(bool compute_out_tangent) {
  DoubleBackwardProblem p;
  fill(p);
  p.tangent = tangents();
  if (compute_out_tangent) p.out_tangent = out_tangent.view;
  p.logsumexp_tangent = logsumexp_tangent.view.data;
  return p;
}

Call Call::along_tangents(double step) const {
  Call other(spec, DType::kFloat64);
  const auto add = [&](Array& to, const Array& from, const Array* tangent) {
    for (int64_t b = 0; b < to.sizes[0]; ++b) {
      for (int64_t h = 0; h < to.sizes[1]; ++h) {
        for (int64_t row = 0; row < to.sizes[2]; ++row) {
          for (int64_t column = 0; column < to.sizes[3]; ++column) {
            const double change = tangent == nullptr ? 0 : step * tangent->at(b, h, row, column);
            to.set(b, h, row, column, from.at(b, h, row, column) + change);
          }
        }
      }
    }
  };
  add(other.query, query, &query_tangent);
  add(other.key, key, &key_tangent);
  add(other.value, value, &value_tangent);
  add(other.grad_out, grad_out, nullptr);
  add(other.grad_logsumexp, grad_logsumexp, nullptr);
  if (mask) add(*other.mask, *mask, mask_tangent ? &*mask_tangent : nullptr);
  for (int64_t h = 0; h < spec.heads; ++h) {
    static_cast<double*>(other.slopes.data())[h] += step * number_at(slopes_tangent, h);
    static_cast<double*>(other.sinks.data())[h] += step * number_at(sinks_tangent, h);
  }
  return other;
}

Expected expected_tangents(const Call& call) {
  constexpr double kStep = 1e-5;
  Expected tangents = expect(call.along_tangents(kStep));
  const Expected back = expect(call.along_tangents(-kStep));
  const auto differentiate = [&](Numbers& plus, const Numbers& minus) {
    double largest = 0;
    for (size_t i = 0; i < plus.values.size(); ++i) {
      const double change = plus.values[i] - minus.values[i];  // NaN (-inf - -inf) in a fully masked row
      plus.values[i] = std::isnan(change) ? 0 : change / (2 * kStep);
      largest = std::max(largest, std::abs(plus.values[i]));
    }
    for (size_t i = 0; i < plus.values.size(); ++i) plus.magnitudes[i] = largest + plus.magnitudes[i];
  };
  differentiate(tangents.out, back.out);
  differentiate(tangents.logsumexp, back.logsumexp);
  differentiate(tangents.grad_query, back.grad_query);
  differentiate(tangents.grad_key, back.grad_key);
  differentiate(tangents.grad_value, back.grad_value);
  differentiate(tangents.grad_mask, back.grad_mask);
  differentiate(tangents.grad_slopes, back.grad_slopes);
  differentiate(tangents.grad_sinks, back.grad_sinks);
  return tangents;
}

Expected expect(const Call& call) {
  const Case& c = call.spec;
  const int64_t sequences = c.varlen ? kSequences : c.batch, group = c.heads / c.kv_heads;
  // Scores are not rounded to the dtype: their errors, which are relative errors of weights, are in the accumulate eps.
  const double accumulating = eps_of(accumulate_type(call.dtype)) / eps_of(call.dtype);
  Expected e{{c.batch, c.heads, c.seqlen_q, c.head_dim_v},
             {c.batch, c.heads, c.seqlen_q, 1},
             {c.batch, c.heads, c.seqlen_q, c.seqlen_k},
             {c.batch, 1, c.seqlen_q, c.seqlen_k},
             {c.batch, c.heads, c.seqlen_q, c.head_dim},
             {c.batch, c.kv_heads, c.seqlen_k, c.head_dim},
             {c.batch, c.kv_heads, c.seqlen_k, c.head_dim_v},
             {1, c.heads, c.seqlen_q, c.seqlen_k},
             {sequences, c.heads, 1, 1},
             {sequences, c.heads, 1, 1}};
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t b = c.varlen ? 0 : s;
    const int64_t first_q = c.varlen ? value_at(call.cu_seqlens_q, s) : 0,
                  first_k = c.varlen ? value_at(call.cu_seqlens_k, s) : 0;
    const int64_t length_q = c.varlen ? value_at(call.cu_seqlens_q, s + 1) - first_q : c.seqlen_q;
    const int64_t length_k = c.varlen        ? value_at(call.cu_seqlens_k, s + 1) - first_k
                             : c.key_lengths ? value_at(call.lengths, s)
                                             : c.seqlen_k;
    for (int64_t h = 0; h < c.heads; ++h) {
      for (int64_t q = 0; q < length_q; ++q) {
        const int64_t row = first_q + q,
                      diagonal = q + c.query_offset - c.key_offset + (c.bottom_right ? length_k - length_q : 0);
        std::vector<double> score(static_cast<size_t>(length_k)), softcap_grad(score.size(), 1), kept(score.size(), 1);
        std::vector<double> magnitude_of_score(score.size()), roundings(score.size());
        double total = c.sinks ? std::exp(number_at(call.sinks, h)) : 0;
        for (int64_t k = 0; k < length_k; ++k) {
          double& x = score[static_cast<size_t>(k)];
          for (int64_t d = 0; d < c.head_dim; ++d) {
            const double term = call.query.at(b, h, row, d) * call.key.at(b, h / group, first_k + k, d);
            x += term;
            magnitude_of_score[static_cast<size_t>(k)] += std::abs(c.scale * term);
          }
          x *= c.scale;
          if (c.softcap > 0) {
            const double tanh = std::tanh(x / c.softcap);
            x = c.softcap * tanh;
            softcap_grad[static_cast<size_t>(k)] = 1 - tanh * tanh;
          }
          if (c.alibi) x -= number_at(call.slopes, h) * static_cast<double>(std::abs(diagonal - k));
          if (c.mask != Mask::kNone) {
            const double bias =
                call.mask->at(0, h, c.mask == Mask::kFloatPerKey ? 0 : q, c.mask == Mask::kFloatPerQuery ? 0 : k);
            x = c.mask != Mask::kBool ? x + bias : bias != 0 ? x : -INFINITY;
          }
          if (k < diagonal - c.window_left || k > diagonal + c.window_right) x = -INFINITY;
          if (extra_mask_hides(k - diagonal) || blocks_hide(c, h, q, k)) x = -INFINITY;
          total += std::exp(x);
          if (c.dropout_p > 0) {
            const long dropped = std::lround(c.dropout_p * 65536);
            const auto words = philox<ScalarWords>(
                {0x89ABCDEFu, 0x01234567u}, static_cast<uint32_t>(c.query_offset + q),
                static_cast<uint32_t>((c.key_offset + k) / 8), static_cast<uint32_t>(s * c.heads + h), 42u);
            const int64_t j = (c.key_offset + k) % 8;
            const uint32_t bits = (words.word[j / 2] >> (16 * (j % 2))) & 0xFFFF;
            kept[static_cast<size_t>(k)] = bits >= dropped ? 65536.0 / (65536 - dropped) : 0;
          }
        }
        const double logsumexp = std::log(total);
        e.logsumexp.add(b, h, row, 0, logsumexp, total > 0 ? 1 + std::abs(logsumexp) : 0);
        std::vector<double> grad(score.size()), grad_magnitude(score.size());
        double delta = -call.grad_logsumexp.at(b, h, row, 0), delta_magnitude = std::abs(delta);
        for (int64_t k = 0; k < length_k; ++k) {
          const auto i = static_cast<size_t>(k);
          score[i] = total > 0 ? std::exp(score[i] - logsumexp) : 0;
          const double weight = score[i] * kept[i];
          if (score[i] > 0) roundings[i] = 1 + accumulating * (std::abs(std::log(score[i])) + magnitude_of_score[i]);
          const double share = weight / static_cast<double>(c.heads);
          e.weights.add(b, h, row, k, weight, weight * roundings[i]);
          e.mean_weights.add(b, 0, row, k, share, share * roundings[i]);
          if (score[i] > 0) e.logsumexp.add(b, h, row, 0, 0, score[i] * magnitude_of_score[i]);
          for (int64_t d = 0; d < c.head_dim_v; ++d) {
            const double value = call.value.at(b, h / group, first_k + k, d), grad_out = call.grad_out.at(b, h, row, d);
            if (weight == 0) continue;  // value may be NaN
            e.out.add(b, h, row, d, weight * value, weight * roundings[i] * std::abs(value));
            grad[i] += kept[i] * grad_out * value;
            grad_magnitude[i] += kept[i] * std::abs(grad_out * value);
            e.grad_value.add(b, h / group, first_k + k, d, weight * grad_out,
                             weight * roundings[i] * std::abs(grad_out));
          }
          delta += score[i] * grad[i];
          delta_magnitude += score[i] * roundings[i] * grad_magnitude[i];
        }
        if (c.sinks && total > 0) {
          const double weight = std::exp(number_at(call.sinks, h) - logsumexp);
          e.grad_sinks.add(s, h, 0, 0, -weight * delta, weight * delta_magnitude);
        }
        for (int64_t k = 0; k < length_k; ++k) {
          const auto i = static_cast<size_t>(k);
          if (score[i] == 0) continue;  // key may be NaN
          const double grad_score = score[i] * (grad[i] - delta),
                       magnitude = score[i] * roundings[i] * (grad_magnitude[i] + delta_magnitude),
                       distance = static_cast<double>(std::abs(diagonal - k));
          if (c.mask != Mask::kNone) {
            e.grad_mask.add(0, h, c.mask == Mask::kFloatPerKey ? 0 : q, c.mask == Mask::kFloatPerQuery ? 0 : k,
                            grad_score, magnitude);
          }
          e.grad_slopes.add(s, h, 0, 0, -grad_score * distance, magnitude * distance);
          for (int64_t d = 0; d < c.head_dim; ++d) {
            const double from_key = c.scale * call.key.at(b, h / group, first_k + k, d),
                         from_query = c.scale * call.query.at(b, h, row, d), grad_dot = grad_score * softcap_grad[i];
            e.grad_query.add(b, h, row, d, grad_dot * from_key, magnitude * std::abs(from_key));
            e.grad_key.add(b, h / group, first_k + k, d, grad_dot * from_query, magnitude * std::abs(from_query));
          }
        }
      }
    }
  }
  return e;
}

}  // namespace attention_ext::test
