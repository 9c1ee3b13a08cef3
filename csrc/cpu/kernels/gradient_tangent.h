// Tangents of a block of score gradients. The names are those of double_backward.h.
#pragma once

#include "cpu/kernels/dropout.h"
#include "cpu/kernels/probability.h"
#include "cpu/kernels/tangent.h"

namespace attention_ext {
namespace {

// A gradient and its tangent: dP and dP' before dropout, without kept_scale; or dS and dS'.
template <class T>
struct Gradients {
  Matrix<T> grad, tangent;
};

// Per lane of a tile. Until D' is known `delta_tangent` and `centred` are the sums that become it.
template <class T>
struct GradientRows {
  T *mean, *delta, *delta_tangent, *centred;

  GradientRows from(int64_t lane) const { return {mean + lane, delta + lane, delta_tangent + lane, centred + lane}; }
};

// Sums for D' = rowsum(P' dP + P dP'), as far as they are known before m is: rowsum(P S' (dP - D) + P dP') and
// rowsum(P (dP - D)). Centred, they do not cancel each other.
template <class T>
void add_to_delta_tangent(const Dropout& dropout, const Tile& tile, Range k, const Scores<T>& scores,
                          const Gradients<T>& gradients, const GradientRows<T>& rows) {
  const Vec<T> kept_scale = splat<T>(static_cast<T>(dropout.kept_scale)), zero{};
  alignas(64) T sum[kQueries<T>] = {}, centred[kQueries<T>] = {};  // of the block: long rows lose less that way
  for_each_vector<T>(dropout, tile, k, [&](int64_t r, int64_t lane, auto kept) __attribute__((always_inline)) {
    const Vec<T> prob = load(scores.weight.row(r) + lane), weighted_tangent = load(scores.tangent.row(r) + lane);
    const Vec<T> grad = (kept ? load(gradients.grad.row(r) + lane) * kept_scale : zero) - load(rows.delta + lane);
    const Vec<T> grad_tangent = kept ? load(gradients.tangent.row(r) + lane) * kept_scale : zero;
    const auto hidden = prob == zero;
    store(sum + lane, load(sum + lane) + (hidden ? zero : fma(weighted_tangent, grad, prob * grad_tangent)));
    store(centred + lane, load(centred + lane) + (hidden ? zero : prob * grad));
  });
  for (int64_t lane = 0; lane < tile.vectors * kLanes<T>; lane += kLanes<T>) {
    store(rows.delta_tangent + lane, load(rows.delta_tangent + lane) + load(sum + lane));
    store(rows.centred + lane, load(rows.centred + lane) + load(centred + lane));
  }
}

// The sums become D'. With a sink P' of the keys does not sum to 0, and centring by D took D times that sum away.
template <class T>
void finish_delta_tangent(const JvpProblem& p, const Tile& tile, const T* mean, const GradientRows<T>& rows,
                          T* delta_tangent) {
  const Sequence& s = tile.sequence;
  const double sink_tangent = p.tangent.sinks ? p.tangent.sinks[s.batch * p.heads + tile.head] : 0.0;
  for (int64_t r = 0; r < tile.q.size(); ++r) {
    delta_tangent[r] = rows.delta_tangent[r] - mean[r] * rows.centred[r];
    if (!p.sinks) continue;
    const double prob_tangent =
        sink_prob<T>(p, s, tile.head, tile.q.begin + r) * (static_cast<double>(mean[r]) - sink_tangent);
    delta_tangent[r] += static_cast<T>(prob_tangent * static_cast<double>(rows.delta[r]));
  }
}

// From P, P S', dP and dP': dropout(P'), dS and dS'.
template <class T>
void score_gradient_tangents(const Dropout& dropout, const Tile& tile, Range k, const Scores<T>& scores,
                             const Gradients<T>& gradients, const GradientRows<T>& rows, Matrix<T> weight_tangent,
                             const Gradients<T>& to) {
  const Vec<T> kept_scale = splat<T>(static_cast<T>(dropout.kept_scale)), zero{};
  for_each_vector<T>(dropout, tile, k, [&](int64_t r, int64_t lane, auto kept) __attribute__((always_inline)) {
    const Vec<T> g = load(gradients.grad.row(r) + lane), gt = load(gradients.tangent.row(r) + lane);
    const Vec<T> prob = load(scores.weight.row(r) + lane);
    const Vec<T> prob_tangent = load(scores.tangent.row(r) + lane) - prob * load(rows.mean + lane);
    const Vec<T> centred = (kept ? g * kept_scale : zero) - load(rows.delta + lane);
    const Vec<T> centred_tangent = (kept ? gt * kept_scale : zero) - load(rows.delta_tangent + lane);
    const Vec<T> second = fma(prob_tangent, centred, prob * centred_tangent);
    const auto hidden = prob == zero;
    store(weight_tangent.row(r) + lane, hidden ? zero : (kept ? prob_tangent : zero));
    store(to.grad.row(r) + lane, hidden ? zero : prob * centred);
    store(to.tangent.row(r) + lane, hidden ? zero : second);
  });
}

// dS, dS' become dU, dU'.
template <class T>
void apply_softcap_grad(const SoftcapGrads<T>& softcap_grads, int64_t keys, int64_t vectors,
                        const Gradients<T>& gradients) {
  for (int64_t r = 0; r < keys; ++r) {
    for (int64_t lane = 0; lane < vectors * kLanes<T>; lane += kLanes<T>) {
      T *g = gradients.grad.row(r) + lane, *gt = gradients.tangent.row(r) + lane;
      const Vec<T> grad = load(softcap_grads.grad.row(r) + lane), grad2 = load(softcap_grads.grad2.row(r) + lane);
      store(gt, load(gt) * grad + load(g) * grad2);
      store(g, load(g) * grad);
    }
  }
}

}  // namespace
}  // namespace attention_ext
