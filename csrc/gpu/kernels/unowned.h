// Clears the results of a pass for the rows of packed tensors that no sequence owns. Where they begin stands in device
// memory: blocks of threads that find their rows owned have nothing to do.
#pragma once

#include <type_traits>

#include "core/unowned.h"
#include "gpu/warp/warp.h"

namespace attention_ext {
namespace {

template <class ProblemType>
struct ClearUnowned {
  using Problem = ProblemType;
  static constexpr int kThreads = 128, kRows = 64;
  static constexpr size_t kSharedBytes = 0;

  static int64_t blocks(const AttentionProblem& p) { return ceil_div(maximum(p.seqlen_q, p.seqlen_k), kRows); }

  ATTENTION_DEVICE static void run(const Problem& p, void*) {
    clear_unowned(p, rows(p.cu_seqlens_q, p.batch, p.seqlen_q), rows(p.cu_seqlens_k, p.batch, p.seqlen_k));
  }

 private:
  // This block's.
  ATTENTION_DEVICE static UnownedRows rows(const int64_t* cu_seqlens, int64_t batch, int64_t total) {
    const Range all = unowned_rows(cu_seqlens, batch, total);
    const int64_t first = block_index() * kRows;
    return {{maximum(all.begin, first), minimum(all.end, first + kRows)},
            {thread_index() / kWarpSize, kThreads / kWarpSize, thread_index() % kWarpSize, kWarpSize}};
  }
};

}  // namespace
}  // namespace attention_ext
