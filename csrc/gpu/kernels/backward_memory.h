// The workspace that the kernels of a backward call share, and sums over the threads of a block.
#pragma once

#include "core/varlen.h"
#include "gpu/warp/warp.h"

namespace attention_ext {
namespace {

constexpr size_t kWorkspaceAlignment = 256;

template <class T>
struct BackwardMemory {
  T *delta, *delta_tangent;  // (b, h, q)
  T* query_parts;            // (parts, b, h, q, d) of grad_query, where keys are in several parts; then without slopes
  double* slope_sums;        // one of each tile of queries, by QueryTileIndex::number

  ATTENTION_DEVICE BackwardMemory(const BackwardProblem& p, void* workspace)
      : delta(static_cast<T*>(workspace)),
        delta_tangent(delta + delta_bytes(p) / static_cast<int64_t>(sizeof(T))),
        query_parts(delta + 2 * delta_bytes(p) / static_cast<int64_t>(sizeof(T))),
        slope_sums(reinterpret_cast<double*>(static_cast<char*>(workspace) + 2 * delta_bytes(p))) {}

  ATTENTION_INLINE static int64_t rows(const BackwardProblem& p) {
    return (p.cu_seqlens_q ? 1 : p.batch) * p.heads * p.seqlen_q;
  }
  ATTENTION_INLINE static int64_t delta_bytes(const BackwardProblem& p) {
    return round_up(rows(p) * static_cast<int64_t>(sizeof(T)), kWorkspaceAlignment);
  }
  static size_t bytes(const BackwardProblem& p, int64_t query_tiles, int64_t parts = 1) {
    const int64_t sums = parts > 1 ? parts * rows(p) * p.head_dim * static_cast<int64_t>(sizeof(T))
                                   : query_tiles * static_cast<int64_t>(sizeof(double));
    return static_cast<size_t>(2 * delta_bytes(p) + sums);
  }

  ATTENTION_DEVICE T* query_part(const BackwardProblem& p, int64_t part, int64_t row) const {
    return query_parts + (part * rows(p) + row) * p.head_dim;
  }

  // product: rowsum(grad_out * out)
  ATTENTION_DEVICE void store_delta(const BackwardProblem& p, int64_t row, T product) const {
    delta[row] = product - (p.grad_logsumexp ? static_cast<const T*>(p.grad_logsumexp)[row] : T(0));
  }
};

template <class T>
ATTENTION_DEVICE T sum_of_warp(T x) {
  ATTENTION_UNROLL
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// A sum of many numbers whose roundings are kept apart (Knuth's two-sum): as accurate as a sum in double, without its
// instructions, which most GPUs issue at a small fraction of the rate.
template <class T>
class LongSum {
 public:
  ATTENTION_DEVICE void add(T x) {
    const T next = sum_ + x, added = next - sum_;
    low_ += (sum_ - (next - added)) + (x - added);
    sum_ = next;
  }
  ATTENTION_DEVICE double total() const {
    const auto sum = static_cast<double>(sum_), low = static_cast<double>(low_);
    return low == low ? sum + low : sum;  // NaN where the sum is infinite
  }

 private:
  T sum_ = 0, low_ = 0;
};

// The sum over all threads, added in a fixed order, to *to. Shared memory must be free.
template <int kThreads>
ATTENTION_DEVICE void sum_block(double x, double* to) {
  auto* sums = reinterpret_cast<double*>(shared_memory());
  x = sum_of_warp(x);
  synchronize_block();
  if (thread_index() % kWarpSize == 0) store_shared(sums + thread_index() / kWarpSize, x);
  synchronize_block();
  if (thread_index() != 0) return;
  double total = 0;
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp) total += load_shared(sums + warp);
  *to = total;
}

}  // namespace
}  // namespace attention_ext
