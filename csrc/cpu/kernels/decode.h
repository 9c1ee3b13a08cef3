// The forward pass for a few queries against many keys, as in decoding with a cache. Keys lie across lanes, all heads
// of a group share each key while it is in cache, and the keys of a head may be split over jobs, merged in order
// afterwards.
#pragma once

#include "cpu/kernels/decode_products.h"
#include "cpu/kernels/decode_splits.h"

namespace attention_ext {
namespace {

constexpr int64_t kValueRows = 48;  // a divisor of kKeys: that many rows stay in L1

template <class C>
struct DecodeScratch {
  using T = typename C::Scalar;
  T *query, *key_rows, *value_rows, *score;

  DecodeScratch(Arena& arena, const DecodeShape<C>& shape) {
    query = arena.take<T>(shape.rows * shape.width);
    key_rows = arena.take<T>(kLanes<T> * shape.width);
    value_rows = arena.take<T>(minimum(kValueRows, shape.keys) * shape.columns);
    score = arena.take<T>(shape.rows * shape.keys);
  }
};

template <class C>
class DecodeJob {
  using T = typename C::Scalar;
  static constexpr int64_t kColumnsTogether = kTileVectors * kLanes<T>;

 public:
  static void run(const AttentionProblem& problem, void* shared, void* scratch, int64_t job) {
    const auto& p = static_cast<const ForwardProblem&>(problem);
    if (!p.serves(job / DecodeShape<C>(p).splits / p.kv_heads)) return;
    Arena shared_arena(shared), scratch_arena(scratch);
    DecodeJob(p, shared_arena, scratch_arena, job).mainloop();
  }

 private:
  DecodeJob(const ForwardProblem& p, Arena& shared, Arena& scratch, int64_t job)
      : p_(p), shape_(p), shared_(shared, shape_), scratch_(scratch, shape_) {
    const int64_t all = job / shape_.splits;
    split_ = job % shape_.splits;
    kv_head_ = all % p.kv_heads;
    sequence_ = sequence_of(p, all / p.kv_heads);
    maximum_ = shared_.maximum + job * shape_.rows;
    sum_ = shared_.sum + job * shape_.rows;
    sums_ = {shared_.sums + job * shape_.rows * shape_.columns, shape_.columns};
  }

  void mainloop() {
    open();
    visible_ = visible_keys(p_, sequence_, {0, sequence_.length_q});
    const int64_t begin = visible_.begin + split_ * kKeysPerSplit;
    const int64_t end = minimum(begin + kKeysPerSplit, visible_.end);
    for (Range k = block_from(begin); k.begin < end;) {
      const Range next = block_from(k.end);
      block(k, next);
      k = next;
    }
  }

  // The next keys from k on, none of them hidden from all queries by the sparse mask; at the end of all keys none.
  Range block_from(int64_t k) const {
    for (; k < visible_.end; k = block_end(k)) {
      const Range keys{k, block_end(k)};
      if (!p_.sparse_mask) return keys;
      const int64_t head = kv_head_ * shape_.group;
      const Range run =
          p_.sparse_mask.first_run(sequence_.batch, {head, head + shape_.group}, {0, sequence_.length_q}, keys);
      if (!run.empty()) return run;
    }
    return {visible_.end, visible_.end};
  }
  int64_t block_end(int64_t k) const {
    return minimum(visible_.begin + round_up(k - visible_.begin + 1, kKeys), visible_.end);
  }

  void open() {
    for (int64_t r = 0; r < shape_.rows; ++r) {
      maximum_[r] = static_cast<T>(-__builtin_inf());
      sum_[r] = 0;
    }
    clear_lanes(sums_.data, shape_.rows * shape_.columns);
    for (int64_t g = 0; g < shape_.group; ++g) {
      copy_rows(source_of(p_.query, sequence_.tensor_batch, kv_head_ * shape_.group + g, sequence_.begin_q),
                sequence_.length_q, sequence_.length_q, p_.head_dim,
                Matrix<T>{scratch_.query + g * sequence_.length_q * shape_.width, shape_.width});
    }
  }

  // Few keys at a time, so that all rows of queries find them in L1; while dot products run, the block's values are on
  // their way, and the next block's keys while the values are summed.
  void block(Range k, Range next) {
    const int64_t rows = shape_.group * sequence_.length_q;
    RowsAhead values = RowsAhead(source(p_.value, k.begin), k.size(), p_.head_dim_v)
                           .in_steps(k.size() / kLanes<T> * rows * (shape_.width / kLanes<T>));
    for (int64_t i = 0; i < k.size(); i += kLanes<T>) {
      const int64_t keys = minimum<int64_t>(kLanes<T>, k.size() - i);
      with_rows(source(p_.key, k.begin + i), keys, p_.head_dim, scratch_.key_rows,
                [&](const auto* key, int64_t stride) __attribute__((always_inline)) {
                  for_row_groups<T>(rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
                    const Matrix<T> to = columns_from(score(r), i);
                    if (keys == kLanes<T>) {
                      score_keys<T, count>(query(r), key, stride, shape_.width, to, values);
                    } else {
                      score_few_keys<T, count>(query(r), key, stride, keys, shape_.width, to);
                    }
                  });
                });
    }
    bool seen = false;
    for (int64_t g = 0; g < shape_.group; ++g) {
      for (int64_t q = 0; q < sequence_.length_q; ++q) seen |= softmax_row(g, q, k);
    }
    if (!seen) return;
    RowsAhead next_keys =
        RowsAhead(source(p_.key, next.begin), next.size(), p_.head_dim)
            .in_steps(k.size() * row_groups(rows, kTogether<T>) * ceil_div(shape_.columns, kColumnsTogether));
    for (int64_t i = 0; i < k.size(); i += kValueRows) {
      const int64_t keys = minimum(kValueRows, k.size() - i);
      with_rows(source(p_.value, k.begin + i), keys, p_.head_dim_v, scratch_.value_rows,
                [&](const auto* value, int64_t stride) __attribute__((always_inline)) {
                  for_row_groups<T>(rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
                    add_all_values<count>(columns_from(score(r), i), value, stride, keys, rows_from(sums_, r),
                                          next_keys);
                  });
                });
    }
  }

  template <int kRows, class Storage>
  void add_all_values(Matrix<T> score, const Storage* value, int64_t stride, int64_t keys, Matrix<T> sums,
                      RowsAhead& ahead) const {
    for (int64_t c = 0; c < shape_.columns; c += kColumnsTogether) {
      const int64_t vectors = minimum<int64_t>(kTileVectors, (shape_.columns - c) / kLanes<T>);
      unroll<kTileVectors>(UNROLLED(n) {
        if (vectors == n + 1) {
          add_values<T, kRows, n + 1>(as_operand(score), value + c, stride, keys, columns_from(sums, c), ahead);
        }
      });
    }
  }

  // Rows of the key head from key k of the sequence on.
  Source source(const View& view, int64_t k) const {
    return source_of(view, sequence_.tensor_batch, kv_head_, sequence_.begin_k + k);
  }
  Matrix<T> score(int64_t r) const { return {scratch_.score + r * shape_.keys, shape_.keys}; }
  Matrix<const T> query(int64_t r) const { return {scratch_.query + r * shape_.width, shape_.width}; }

  // One query, a key per lane. Whether it sees any.
  bool softmax_row(int64_t g, int64_t q, Range k) {
    using Ops = VectorOps<T>;
    const int64_t head = kv_head_ * shape_.group + g, r = g * sequence_.length_q + q;
    T* scores = score(r).data;
    ScoreMods mods = score_mods_of(p_, sequence_, head);
    const bool reads_bits =
        p_.sparse_mask && p_.sparse_mask.block_mask(sequence_.batch, head, {q, q + 1}, k) != BlockMask::kFull;
    mods.bias.present |= reads_bits;
    const Vec<T> hidden = splat<T>(static_cast<T>(-__builtin_inf()));
    Vec<T> block_max = hidden;
    decltype(block_max != hidden) seen{};
    for (int64_t i = 0; i < k.size(); i += kLanes<T>) {
      const int64_t count = k.size() - i;
      const auto distance = static_cast<T>(k.begin + i - q - sequence_.diagonal);
      Position<Ops> at{splat<T>(distance) + iota<T>(), mask_row(head, q, k.begin + i, count)};
      if (reads_bits) at.bias = sees(head, q, k.begin + i, count) ? at.bias : hidden;
      Vec<T> s = mods.masked<Ops>(mods.score_mod<Ops>(load(scores + i), at).score, at);
      s = iota<T>() < splat<T>(static_cast<T>(count)) ? s : hidden;
      store(scores + i, s);
      seen |= s != hidden;
      block_max = max(s, block_max);
    }
    MergedState<T> state{maximum_[r], sum_[r]};
    state.rescale(max_lanes<T>(block_max));
    const Vec<T> base = finite_or_zero<T>(splat<T>(state.maximum)), log2e = splat<T>(static_cast<T>(kLog2E));
    Vec<T> sum{};
    for (int64_t i = 0; i < k.size(); i += kLanes<T>) {
      const Vec<T> weight = exp2<T>((load(scores + i) - base) * log2e);
      store(scores + i, weight);
      sum += weight;
    }
    maximum_[r] = state.maximum;
    sum_[r] = state.sum + sum_lanes<T>(sum);
    for (int64_t c = 0; c < shape_.columns; c += kLanes<T>) {
      T* sums = sums_.row(r) + c;
      store(sums, load(sums) * splat<T>(state.rescaled));
    }
    return any_lane(seen);
  }

  Vec<T> mask_row(int64_t head, int64_t q, int64_t k, int64_t count) const {
    Vec<T> bias{};
    if (!p_.attn_mask) return bias;
    const Source row = source_of(p_.attn_mask, sequence_.batch, head, q);
    with_mask_storage<T>(row.dtype, [&](auto* storage) __attribute__((always_inline)) {
      const auto* data = reinterpret_cast<decltype(storage)>(const_cast<char*>(row.data));
      bias = load_mask<T>(data + k * row.stride_col, row.stride_col, count);
    });
    return bias;
  }

  // By the sparse mask, a key per lane.
  auto sees(int64_t head, int64_t q, int64_t k, int64_t count) const {
    using Word = std::decay_t<decltype(KeyBits<T>{}[0])>;
    const Range keys{k, k + minimum<int64_t>(count, kLanes<T>)};
    const auto bits = static_cast<Word>(p_.sparse_mask.visible_bits(sequence_.batch, head, q, keys));
    return (splat<Word>(bits) & (splat<Word>(1) << iota<Word>())) != 0;
  }

  const ForwardProblem& p_;
  DecodeShape<C> shape_;
  DecodeShared<C> shared_;
  DecodeScratch<C> scratch_;
  Sequence sequence_{};
  int64_t kv_head_, split_;
  Range visible_{};  // all keys: those after this split's are likely to be the next job
  T *maximum_, *sum_;
  Matrix<T> sums_;
};

template <class C>
Plan plan_decode(const AttentionProblem& p) {
  const DecodeShape<C> shape(p);
  Arena shared(nullptr), scratch(nullptr);
  DecodeShared<C>(shared, shape);
  DecodeScratch<C>(scratch, shape);
  Plan plan;
  plan.phases[plan.phase_count++] = {shape.jobs, DecodeJob<C>::run};
  plan.phases[plan.phase_count++] = {p.batch * p.kv_heads, merge_splits<C>};
  plan.shared_bytes = shared.used();
  plan.scratch_bytes = scratch.used();
  return plan;
}

}  // namespace
}  // namespace attention_ext
