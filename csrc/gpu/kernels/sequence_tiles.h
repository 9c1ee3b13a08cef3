// How the rows of a batch are cut into tiles for blocks of threads, without a look at the lengths of packed sequences
// before the launch.
#pragma once

#include "core/varlen.h"

namespace attention_ext {
namespace {

// A tile of one sequence; it may lie beyond the sequence's end.
struct SequenceTile {
  int64_t batch, index;
};

// Places for the tiles of all sequences, in runs: of each sequence one, or one of all. The latter have total / rows +
// batch places, where packed sequence b takes those from begin / rows + b on, which are as many as its tiles wherever
// it begins. Of the longest sequence nothing is known on a GPU but that it is no longer than all together, and batch
// times that would be far too many.
class SequenceTiles {
 public:
  struct Place {
    int64_t run, place;
  };

  ATTENTION_INLINE static SequenceTiles of_queries(const AttentionProblem& p, int64_t rows) {
    return {p.cu_seqlens_q, p.batch, p.seqlen_q, p.max_seqlen_q, rows};
  }
  ATTENTION_INLINE static SequenceTiles of_keys(const AttentionProblem& p, int64_t rows) {
    return {p.cu_seqlens_k, p.batch, p.seqlen_k, p.max_seqlen_k, rows};
  }

  ATTENTION_INLINE int64_t runs() const { return shares_places_ ? 1 : batch_; }
  ATTENTION_INLINE int64_t places() const { return shares_places_ ? total_ / rows_ + batch_ : tiles_; }
  ATTENTION_INLINE int64_t count() const { return runs() * places(); }

  ATTENTION_INLINE Place of(const SequenceTile& tile) const {
    if (!shares_places_) return {tile.batch, tile.index};
    return {0, first_place(tile.batch) + tile.index};
  }

  ATTENTION_INLINE SequenceTile at(const Place& x) const {
    if (!shares_places_) return {x.run, x.place};
    int64_t batch = 0;
    for (int64_t end = batch_; end - batch > 1;) {
      const int64_t middle = (batch + end) / 2;
      (first_place(middle) <= x.place ? batch : end) = middle;
    }
    const int64_t index = x.place - first_place(batch);
    return {batch, index >= 0 ? index : tiles_};  // negative where cu_seqlens do not begin at 0
  }

 private:
  ATTENTION_INLINE SequenceTiles(const int64_t* cu_seqlens, int64_t batch, int64_t total, int64_t longest, int64_t rows)
      : cu_seqlens_(cu_seqlens), batch_(batch), total_(total), rows_(rows), tiles_(ceil_div(longest, rows)) {
    shares_places_ = cu_seqlens && total / rows + batch < batch * tiles_;
  }

  ATTENTION_INLINE int64_t first_place(int64_t b) const { return clamp(cu_seqlens_[b], 0, total_) / rows_ + b; }

  const int64_t* cu_seqlens_;
  int64_t batch_, total_, rows_, tiles_;
  bool shares_places_;
};

}  // namespace
}  // namespace attention_ext
