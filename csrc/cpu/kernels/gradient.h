// A block of weights and score gradients: how they are made, how the products read them, and the gradients of attn_mask
// and ALiBi slopes.
#pragma once

#include "cpu/kernels/backward_memory.h"
#include "cpu/kernels/dropout.h"
#include "cpu/kernels/probability.h"

namespace attention_ext {
namespace {

// weight, grad_weight (key, query) become the factor of grad_out in grad_value (weights after dropout, not rescaled)
// and the score gradient weight * (grad_weight - delta). Where a weight is 0 so is the gradient, whatever hidden values
// hold.
template <class T>
void score_gradient(const Dropout& dropout, const Tile& tile, Range k, Matrix<T> weight, Matrix<T> grad_weight,
                    const T* delta) {
  const Vec<T> kept_scale = splat<T>(static_cast<T>(dropout.kept_scale));
  for_each_vector<T>(dropout, tile, k, [&](int64_t r, int64_t lane, auto kept) __attribute__((always_inline)) {
    T *w = weight.row(r) + lane, *g = grad_weight.row(r) + lane;
    const Vec<T> whole = load(w), grad = kept ? load(g) * kept_scale : Vec<T>{};
    store(g, whole == Vec<T>{} ? Vec<T>{} : whole * (grad - load(delta + lane)));
    store(w, kept ? whole : Vec<T>{});
  });
}

// Weights and score gradients of a block as the products read them.
template <class C>
struct GradientOperands {
  Matrix<const typename C::Element> weight_by_query, by_query, by_key;
};

// Of weights and score gradients that are done.
template <class C>
GradientOperands<C> gradient_operands(Matrix<typename C::Scalar> weight, Matrix<typename C::Scalar> grad, int64_t keys,
                                      int64_t vectors, const GradientPairs<C>& pairs) {
  clear_spare_row(weight, keys, vectors);
  clear_spare_row(grad, keys, vectors);
  const int64_t rows = round_up(keys, 2);
  return {weights_by_queries<C>(weight, rows, vectors, pairs.weight_by_query.data),
          weights_by_queries<C>(grad, rows, vectors, pairs.by_query.data),
          weights_by_keys<C>(grad, keys, vectors, pairs.by_key.data)};
}

// All of it at once, from dot products in `weight` and grad_out . value in `grad`, where nothing is dropped and nothing
// else wants the gradients: operands that C pairs are never stored unpaired.
template <class C, int kVectors, ScoreMode kMode>
GradientOperands<C> plain_gradient_operands(const Block<typename C::Scalar>& block, const typename C::Scalar* logsumexp,
                                            const typename C::Scalar* delta, Matrix<typename C::Scalar> weight,
                                            Matrix<typename C::Scalar> grad, const GradientPairs<C>& pairs) {
  using T = typename C::Scalar;
  constexpr int64_t kStep = kLanes<T>;
  const Probability<C, kVectors, kMode> probability(block, logsumexp);
  const int64_t rows = block.k.size();
  const auto make = [&](int64_t r, auto n, Vec<T>& w, Vec<T>& g) __attribute__((always_inline)) {
    const Weights<T> made = probability(r, n, load(weight.row(r) + n * kStep));
    w = made.weight;
    g = load(grad.row(r) + n * kStep) - load(delta + n * kStep);
    g = w == Vec<T>{} ? Vec<T>{} : w * g * made.softcap_grad;
  };
  if constexpr (C::kPair == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      unroll<kVectors>(UNROLLED(n) {
        Vec<T> w, g;
        make(r, n, w, g);
        store(weight.row(r) + n * kStep, w);
        store(grad.row(r) + n * kStep, g);
      });
    }
    return gradient_operands<C>(weight, grad, rows, kVectors, pairs);
  } else {
    for (int64_t r = 0; r < rows; r += 2) {
      unroll<(kVectors + 1) / 2>(UNROLLED(both) {
        Vec<T> w[2][2] = {}, g[2][2] = {};  // (row, vector), 0 beyond the last of each
        unroll<2>(UNROLLED(v) {
          constexpr auto kN = std::integral_constant<int, 2 * both + v>{};
          if constexpr (kN < kVectors) {
            make(r, kN, w[0][v], g[0][v]);
            if (r + 1 < rows) make(r + 1, kN, w[1][v], g[1][v]);
            C::store_pair(pairs.by_key.row(r / 2) + kN * kStep, g[0][v], g[1][v]);
          }
        });
        unroll<2>(UNROLLED(i) {
          C::store_neighbours(pairs.weight_by_query.row(r + i) + both * kStep, w[i][0], w[i][1]);
          C::store_neighbours(pairs.by_query.row(r + i) + both * kStep, g[i][0], g[i][1]);
        });
      });
    }
    return {as_operand(pairs.weight_by_query), as_operand(pairs.by_query), as_operand(pairs.by_key)};
  }
}

template <class T>
T sum_of_row(Matrix<const T> m, int64_t row, int64_t vectors) {
  Vec<T> sum{};
  for (int64_t v = 0; v < vectors; ++v) sum += load(m.row(row) + v * kLanes<T>);
  return sum_lanes<T>(sum);
}

// grad_mask (b, h, q, k) in the accumulate type, summed over the axes along which the mask was broadcast.
template <class T>
void add_to_mask_gradient(const View& grad_mask, const Tile& tile, Range k, Matrix<const T> grad_score) {
  const Source head = source_of(grad_mask, tile.sequence.batch, tile.head, 0);
  T* const to =
      reinterpret_cast<T*>(const_cast<char*>(head.data)) + k.begin * head.stride_col + tile.q.begin * head.stride_row;
  if (head.stride_row == 0) {
    for (int64_t r = 0; r < k.size(); ++r) to[r * head.stride_col] += sum_of_row(grad_score, r, tile.vectors);
    return;
  }
  for (int64_t lane = 0; lane < tile.q.size(); lane += kLanes<T>) {
    const int64_t queries = minimum<int64_t>(kLanes<T>, tile.q.size() - lane);
    if (head.stride_col == 0) {
      Vec<T> sum{};
      for (int64_t r = 0; r < k.size(); ++r) sum += load(grad_score.row(r) + lane);
      for (int64_t i = 0; i < queries; ++i) to[(lane + i) * head.stride_row] += sum[i];
      continue;
    }
    for (int64_t r = 0; r < k.size(); r += kLanes<T>) {
      const int64_t keys = minimum<int64_t>(kLanes<T>, k.size() - r);
      Vec<T> block[kLanes<T>];
      unroll<kLanes<T>>(UNROLLED(i) { block[i] = i < keys ? load(grad_score.row(r + i) + lane) : Vec<T>{}; });
      transpose(block);
      unroll<kLanes<T>>(UNROLLED(i) {
        if (i < queries) {
          T* row = to + (lane + i) * head.stride_row + r * head.stride_col;
          store_strided<T>(row, head.stride_col, load_strided<T>(row, head.stride_col, keys) + block[i], keys);
        }
      });
    }
  }
}

template <class T>
double slope_gradient(const Block<T>& block, int64_t vectors, Matrix<const T> grad_score) {
  double sum = 0.0;
  for (int64_t r = 0; r < block.k.size(); ++r) {
    Vec<T> row{};
    for (int v = 0; v < vectors; ++v) {
      const Vec<T> slope_grad = block.mods.alibi.template slope_grad<VectorOps<T>>(block.at(r, v));
      row = fma(load(grad_score.row(r) + v * kLanes<T>), slope_grad, row);
    }
    sum += static_cast<double>(sum_lanes<T>(row));
  }
  return sum;
}

}  // namespace
}  // namespace attention_ext
