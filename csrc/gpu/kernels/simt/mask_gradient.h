// grad_attn_mask: a block of threads owns a tile of it, a warp for each query and a lane for each key, and loops over
// everything that was broadcast along the mask.
#pragma once

#include "gpu/kernels/mask_tiles.h"
#include "gpu/kernels/simt/pair.h"

namespace attention_ext {
namespace {
namespace simt {

template <class T, Order kOrder>
struct MaskGradient {
  using Problem = ProblemOf<kOrder>;
  static constexpr int kThreads = simt::kThreads;
  static constexpr size_t kSharedBytes = kThreads * sizeof(T);

  static int64_t blocks(const BackwardProblem& p) { return MaskTiles(p, kWarps, kWarpSize).blocks(); }

  ATTENTION_DEVICE static void run(const Problem& p, void* workspace) {
    const MaskPart part = MaskTiles(p, kWarps, kWarpSize).part(block_index());
    const BackwardMemory<T> memory(p, workspace);
    T sum = 0;
    for (int64_t batch = part.batches.begin; batch < part.batches.end; ++batch) {
      for (int64_t head = part.heads.begin; head < part.heads.end; ++head) {
        const Head of(p, batch, head);
        const PairGradients<T, kOrder> gradients(p, of, memory);
        for (int64_t tile = part.query_tiles.begin; tile < part.query_tiles.end; ++tile) {
          sum += mainloop(p, gradients, static_cast<int>(tile) * kWarps + warp_index(), part.key_tiles);
        }
      }
    }
    store(p, sum, part.batches.begin, part.heads.begin, part.query_tiles.begin * kWarps + warp_index(),
          part.key_tiles.begin * kWarpSize + lane_index());
  }

 private:
  // The sum over those keys that are this lane's.
  ATTENTION_DEVICE static T mainloop(const Problem& p, const PairGradients<T, kOrder>& gradients, int q,
                                     Range key_tiles) {
    const Head& head = gradients.pairs.head;
    if (q >= head.length_q) return T(0);
    const RowNumbers<T, kOrder> row = gradients.rows.row(q);
    const Range seen = visible_keys(p, head.sequence, {q, q + 1});
    const Span keys({maximum(key_tiles.begin * kWarpSize, seen.begin), minimum(key_tiles.end * kWarpSize, seen.end)});
    T sum = 0;
    for (int k = keys.begin; k < keys.end; ++k) {
      const T gradient = gradients(q, k, row).score;
      if (k % kWarpSize == lane_index()) sum += gradient;
    }
    return sum;
  }

  // Through shared memory, where sums over the tile's queries and keys are made in order.
  ATTENTION_DEVICE static void store(const Problem& p, T sum, int64_t b, int64_t h, int64_t q, int64_t k) {
    const View& to = p.grad_attn_mask;
    const int rows = to.stride_row == 0 ? kWarps : 1, columns = to.stride_col == 0 ? kWarpSize : 1;
    T* own = reinterpret_cast<T*>(shared_memory()) + thread_index();
    store_shared(own, sum);
    synchronize_block();
    if (warp_index() % rows != 0 || lane_index() % columns != 0 || q >= p.max_seqlen_q || k >= p.max_seqlen_k) return;
    T total = 0;
    for (int m = 0; m < rows; ++m) {
      for (int n = 0; n < columns; ++n) total += load_shared(own + m * kWarpSize + n);
    }
    static_cast<T*>(to.data)[b * to.stride_b + h * to.stride_h + q * to.stride_row + k * to.stride_col] = total;
  }
};

}  // namespace simt
}  // namespace
}  // namespace attention_ext
