// A block of dot products and one of grad_out value^T become weights and score gradients; of second order, their
// tangents.
#pragma once

#include "gpu/kernels/backward_memory.h"
#include "gpu/kernels/dropout.h"
#include "gpu/kernels/softmax.h"
#include "gpu/kernels/sources.h"
#include "gpu/kernels/tangent.h"

namespace attention_ext {
namespace {

// Of one query.
template <class T, Order kOrder>
struct alignas(2 * sizeof(T)) RowNumbers {
  T logsumexp, delta;
};
template <class T>
struct alignas(4 * sizeof(T)) RowNumbers<T, Order::kSecond> {
  T logsumexp, delta, logsumexp_tangent, delta_tangent;
};

template <class T, Order kOrder>
struct RowSource {
  LogsumexpRows<T> logsumexp;
  const T *delta, *logsumexp_tangent = nullptr, *delta_tangent = nullptr;

  ATTENTION_DEVICE RowSource(const ProblemOf<kOrder>& p, const Head& head, const BackwardMemory<T>& memory)
      : logsumexp(p, head, p.logsumexp), delta(memory.delta + row_of(p, head.sequence, head.head)) {
    if constexpr (kOrder == Order::kSecond) {
      const int64_t first = row_of(p, head.sequence, head.head);
      logsumexp_tangent = static_cast<const T*>(p.logsumexp_tangent) + first;
      delta_tangent = memory.delta_tangent + first;
    }
  }

  ATTENTION_DEVICE RowNumbers<T, kOrder> row(int q) const {
    const T normaliser = logsumexp.row(q);
    const bool hidden = normaliser == infinity<T>();
    const T own = hidden ? T(0) : delta[q];
    if constexpr (kOrder == Order::kFirst) {
      return {normaliser, own};
    } else {
      return {normaliser, own, hidden ? T(0) : logsumexp_tangent[q], hidden ? T(0) : delta_tangent[q]};
    }
  }
};

// The numbers of streamed queries, beside their tiles.
template <class T, Order kOrder, int kRows, int kStages>
class StreamedNumbers {
  using Numbers = RowNumbers<T, kOrder>;
  struct alignas(2 * sizeof(Numbers)) Pair {
    Numbers row[2];
  };

 public:
  static constexpr size_t kBytes = size_t{kStages} * kRows * sizeof(Numbers);

  ATTENTION_DEVICE StreamedNumbers(const RowSource<T, kOrder>& source, char* memory)
      : source_(source), memory_(reinterpret_cast<Numbers*>(memory)) {}

  ATTENTION_DEVICE void load(int first) {
    if (thread_index() < kRows) own_ = source_.row(first + thread_index());
  }
  ATTENTION_DEVICE void store(int stage) {
    if (thread_index() < kRows) store_shared(memory_ + stage * kRows + thread_index(), own_);
  }
  // Of a lane's columns of fragment n, from `row` of a tile on.
  ATTENTION_DEVICE Numbers at(int stage, int row, int n, int i) const {
    const Numbers* first = memory_ + stage * kRows + row + n * kFragmentColumns + 2 * lane_member();
    return load_shared(reinterpret_cast<const Pair*>(first)).row[i % 2];
  }

 private:
  const RowSource<T, kOrder> source_;
  Numbers* const memory_;
  Numbers own_;
};

// The tiles that own the rows and those that are streamed, in the order of sources.h: queries against keys, or keys
// against queries.
template <class C, ScoreMode kMode, Order kOrder, bool kTransposed, int kTiles, int kRowTiles = 1>
class GradientBlock {
  using T = typename C::Scalar;
  using Block = ScoreBlock<T, kMode, kTransposed>;
  using Scores = Fragments<T, kRowTiles, kTiles>;
  static constexpr bool kSecond = kOrder == Order::kSecond;

 public:
  // The factor of query or key in the gradient of the other; of second order `grad` is that of their tangents.
  ATTENTION_DEVICE const Scores& main() const { return kSecond ? grad_tangent : grad; }

  Scores weight;        // query . key, then the factor of grad_out in grad_value
  Scores grad;          // grad_out . value, then the gradient of scale * query . key
  Scores dot_tangent;   // of second order: tangent of query . key
  Scores grad_tangent;  // likewise, of grad_out . value, then of the gradient

  template <class Own, class Streamed>
  ATTENTION_DEVICE void multiply(const ProblemOf<kOrder>& p, const Own& own, const Streamed& streamed, int row) {
    weight.clear();
    grad.clear();
    if constexpr (kSecond) return multiply_with_tangents(p, own, streamed, row);
    multiply_rows<C>(weight, own[0], streamed.tile[0], row);
    multiply_rows<C>(grad, own[1], streamed.tile[1], row);
  }

  // Rows of queries or keys come together with their tangents, so that what both are multiplied by is read once.
  template <class Own, class Streamed>
  ATTENTION_DEVICE void multiply_with_tangents(const DoubleBackwardProblem& p, const Own& own, const Streamed& streamed,
                                               int row) {
    constexpr int kTangent = 2, kValueTangent = 3;
    const View &own_tangent = kTransposed ? p.tangent.key : p.tangent.query,
               &streamed_tangent = kTransposed ? p.tangent.query : p.tangent.key;
    dot_tangent.clear();
    grad_tangent.clear();
    if (own_tangent) {
      multiply_rows<C>(weight, own[0], dot_tangent, own[kTangent], streamed.tile[0], row);
    } else {
      multiply_rows<C>(weight, own[0], streamed.tile[0], row);
    }
    if (streamed_tangent) multiply_rows<C>(dot_tangent, own[0], streamed.tile[kTangent], row);
    if constexpr (kTransposed) {
      if (p.tangent.value) {
        multiply_rows<C>(grad, own[1], grad_tangent, own[kValueTangent], streamed.tile[1], row);
      } else {
        multiply_rows<C>(grad, own[1], streamed.tile[1], row);
      }
    } else {
      multiply_rows<C>(grad, own[1], streamed.tile[1], row);
      if (p.tangent.value) multiply_rows<C>(grad_tangent, own[1], streamed.tile[kValueTangent], row);
    }
  }

  // rows(m, n, i) gives RowNumbers, and use(gradients) receives those of the scores. Where a weight is 0 so is its
  // gradient, whatever hidden values hold. False where all gradients of this lane are 0 in a block that hides some
  // keys.
  template <class RowOf, class Use>
  ATTENTION_DEVICE bool differentiate(const ProblemOf<kOrder>& p, const Block& block, const Dropout& dropout,
                                      RowOf&& rows, Use&& use) {
    static_assert(!kSecond || kRowTiles == 1);
    ModifiedScore<VectorOps<T, kTiles>> scores[kRowTiles];
    ATTENTION_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      scores[m] = block.scores(weight.tile[m], m);
      if (kMode != ScoreMode::kAll && block.partial) hide(grad.tile[m], scores[m]);
    }
    [[maybe_unused]] typename VectorOps<T, kTiles>::V tangents;
    if constexpr (kSecond) {
      if (kMode != ScoreMode::kAll && block.partial) {
        hide(dot_tangent.tile[0], scores[0]);
        hide(grad_tangent.tile[0], scores[0]);
      }
      tangents = score_tangents(p.tangent, block, scores[0], dot_tangent.tile[0]);
    }
    const auto kept_scale = static_cast<T>(dropout.kept_scale);
    for_each_kept<kRowTiles, kTiles>(block, dropout, [&](int m, int n, int i, bool kept) {
      T &w = weight.tile[m][n].number[i], &g = grad.tile[m][n].number[i];
      const RowNumbers<T, kOrder> row = rows(m, n, i);
      const T prob = weight_of<kMode>(scores[m].score.number[4 * n + i], block.exp_scale(), row.logsumexp);
      const bool hidden = kMode == ScoreMode::kAll && prob == T(0);
      const T centred = (kept ? g * kept_scale : T(0)) - row.delta;
      g = hidden ? T(0) : prob * centred;
      if constexpr (kSecond) {
        T& gt = grad_tangent.tile[m][n].number[i];
        const T prob_tangent = prob * (tangents.number[4 * n + i] - row.logsumexp_tangent);
        const T centred_tangent = (kept ? gt * kept_scale : T(0)) - row.delta_tangent;
        gt = hidden ? T(0) : multiply_add(prob_tangent, centred, prob * centred_tangent);
        w = hidden || !kept ? T(0) : prob_tangent;
      } else {
        w = kept ? prob : T(0);
      }
    });
    use(main());
    if (kMode == ScoreMode::kAll && block.head.mods.is_nonlinear()) differentiate_softcap(scores);
    return !block.changes_scores() || any_gradient();
  }

  ATTENTION_DEVICE bool any_gradient() const {
    if constexpr (kSecond) return any_of(grad) || any_of(grad_tangent);
    return any_of(grad);
  }

  // sums += gradient . streamed, for query or key
  template <class Sums, class Streamed>
  ATTENTION_DEVICE void add_gradient(const ProblemOf<kOrder>& p, Sums& sums, const Streamed& streamed, int row) const {
    multiply_weights<C>(sums, main(), streamed.tile[0], row);
    if constexpr (kSecond) {
      if (kTransposed ? p.tangent.query : p.tangent.key) multiply_weights<C>(sums, grad, streamed.tile[2], row);
    }
  }

 private:
  // Gradients of scores become those of scale * query . key.
  ATTENTION_DEVICE void differentiate_softcap(const ModifiedScore<VectorOps<T, kTiles>> (&scores)[kRowTiles]) {
    for_each_number<kRowTiles, kTiles>([&](int m, int n, int i) {
      const auto score = score_at(scores[m], n, i);
      T& g = grad.tile[m][n].number[i];
      if constexpr (kSecond) {
        T& gt = grad_tangent.tile[m][n].number[i];
        const T curvature = g == T(0) ? T(0) : g * score.softcap_grad2 * dot_tangent.tile[m][n].number[i];
        gt = gt == T(0) ? curvature : multiply_add(gt, score.softcap_grad, curvature);
      }
      g = g == T(0) ? T(0) : g * score.softcap_grad;
    });
  }
};

}  // namespace
}  // namespace attention_ext
