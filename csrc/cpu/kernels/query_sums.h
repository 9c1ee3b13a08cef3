// The sums for grad_query that groups of jobs keep apart, and the keys that each group takes. Without a sparse mask the
// key blocks of a sequence are dealt in turn, and a group has sums of all queries. With one, groups take neighbouring
// blocks, each as many of the mask's, and have sums of those queries alone that see any of their keys.
#pragma once

#include "cpu/kernels/backward_memory.h"

namespace attention_ext {
namespace {

// Of a range of keys, the part that the sparse mask shows to any query, and these queries.
struct Shown {
  int64_t blocks = 0;  // of the mask
  Range queries, keys;
};

ATTENTION_INLINE Range hull_of(Range a, Range b) {
  return a.empty() ? b : Range{minimum(a.begin, b.begin), maximum(a.end, b.end)};
}

inline Shown shown_of(const AttentionProblem& p, const Sequence& s, int64_t kv_head, Range k) {
  const SparseMask& mask = p.sparse_mask;
  const int64_t heads = mask.stride_h == 0 ? 1 : p.group_size();
  const Range all = visible_queries(p, s, k);
  Shown shown;
  for (int64_t h = kv_head * p.group_size(); h < kv_head * p.group_size() + heads; ++h) {
    for (int64_t i = all.begin / mask.block_q; i * mask.block_q < all.end; ++i) {
      const Range q{maximum(all.begin, i * mask.block_q), minimum(all.end, (i + 1) * mask.block_q)};
      const Range visible = visible_keys(p, s, q);
      const Range keys{maximum(k.begin, visible.begin), minimum(k.end, visible.end)};
      const int32_t* const row = mask.row(s.batch, h, i);
      Range seen;
      for (int64_t j = keys.begin / mask.block_k; j * mask.block_k < keys.end; ++j) {
        if (row[j] == kEmptyBlock) continue;
        ++shown.blocks;
        const Range block{j * mask.block_k, (j + 1) * mask.block_k};
        seen = hull_of(seen, {maximum(keys.begin, block.begin), minimum(keys.end, block.end)});
      }
      if (seen.empty()) continue;
      shown.queries = hull_of(shown.queries, q);
      shown.keys = hull_of(shown.keys, seen);
    }
  }
  return shown;
}

// Keys and queries of a sequence that a group works on, for one key head.
struct GroupShare {
  Range keys;       // from its first block on
  int64_t step;     // from block to block
  Range queries;    // whole tiles
  int64_t row = 0;  // where their sums begin, those of one head after another
};

// Deals the key blocks to groups that see about as many blocks of the mask.
template <class T>
void deal_shown(const BackwardProblem& p, const Sequence& s, int64_t kv_head, int64_t groups, GroupShare* shares) {
  const int64_t rows = key_rows_of(p, s);
  const auto block_at = [&](int64_t k) { return Range{k, minimum(k + kKeys, rows)}; };
  int64_t total = 0, before = 0;
  for (int64_t k = 0; k < rows; k += kKeys) total += shown_of(p, s, kv_head, block_at(k)).blocks;
  for (int64_t k = 0; k < rows; k += kKeys) {
    const Shown shown = shown_of(p, s, kv_head, block_at(k));
    GroupShare& share = shares[minimum(before * groups / maximum<int64_t>(total, 1), groups - 1)];
    share.keys = hull_of(share.keys, block_at(k));
    if (!shown.queries.empty()) {
      const Range tiles{shown.queries.begin / kQueries<T> * kQueries<T>,
                        minimum(round_up(shown.queries.end, kQueries<T>), s.length_q)};
      share.queries = hull_of(share.queries, tiles);
    }
    before += shown.blocks;
  }
}

template <class T>
class QuerySums {
 public:
  // dealt_rows: of all sums that `deal` places; of no use without a sparse mask
  QuerySums(Arena& arena, const BackwardProblem& p, const GradientJobs& jobs, int64_t columns, bool adds,
            int64_t dealt_rows)
      : p_(p),
        jobs_(jobs),
        columns_(columns),
        dealt_(adds && p.sparse_mask && jobs.groups > 1),
        shares_(arena.take<GroupShare>(dealt_ ? p.batch * p.kv_heads * jobs.groups : 0)),
        whole_(arena, p, adds && !dealt_ ? jobs.groups : 0, p.heads, p.seqlen_q, columns),
        parts_(arena.take<T>(dealt_rows * columns)) {}

  bool dealt() const { return dealt_; }

  // Finds the shares of all groups, and keeps them unless the arena only measures. The number of rows of their sums.
  int64_t deal() const {
    int64_t row = 0;
    for (int64_t b = 0; b < p_.batch; ++b) {
      const Sequence s = sequence_of(p_, b);
      for (int64_t kv_head = 0; kv_head < p_.kv_heads; ++kv_head) {
        GroupShare shares[kMostGroups] = {};
        deal_shown<T>(p_, s, kv_head, jobs_.groups_for(key_rows_of(p_, s)), shares);
        for (int64_t group = 0; group < jobs_.groups; ++group) {
          shares[group].step = kKeys;
          shares[group].row = row;
          row += p_.group_size() * rows_of(shares[group]);
          if (shares_) share_at(s, kv_head)[group] = shares[group];
        }
      }
    }
    return row;
  }

  GroupShare share(int64_t group, const Sequence& s, int64_t kv_head) const {
    if (dealt_) return share_at(s, kv_head)[group];
    const int64_t rows = key_rows_of(p_, s);
    return {{group * kKeys, rows}, jobs_.groups_for(rows) * kKeys, {0, s.length_q}};
  }

  // From the share's first query on.
  Matrix<T> of(const GroupShare& share, int64_t group, const Sequence& s, int64_t head) const {
    if (!dealt_) return whole_.of(group, s, head, s.begin_q);
    return {parts_ + (share.row + head % p_.group_size() * rows_of(share)) * columns_, columns_};
  }

  void clear(int64_t group, const Sequence& s, int64_t head) const {
    const GroupShare share = this->share(group, s, head / p_.group_size());
    clear_lanes(of(share, group, s, head).data, rows_of(share) * columns_);
  }

  void write(const View& to, int64_t width, const Sequence& s, int64_t head, double factor) const {
    RowSums<T> sums[kMostGroups];
    const int64_t groups = jobs_.groups_for(key_rows_of(p_, s));
    for (int64_t group = 0; group < groups; ++group) {
      const GroupShare share = this->share(group, s, head / p_.group_size());
      sums[group] = {share.queries, of(share, group, s, head)};
    }
    write_sums(source_of(to, s.tensor_batch, head, s.begin_q), s.length_q, width, sums, groups, factor);
  }

 private:
  static int64_t rows_of(const GroupShare& share) { return share.queries.size() + 1; }  // one to spare

  GroupShare* share_at(const Sequence& s, int64_t kv_head) const {
    return shares_ + (s.batch * p_.kv_heads + kv_head) * jobs_.groups;
  }

  const BackwardProblem& p_;
  const GradientJobs jobs_;
  int64_t columns_;
  bool dealt_;
  GroupShare* shares_;  // (batch, key head, group)
  GroupSums<T> whole_;
  T* parts_;
};

}  // namespace
}  // namespace attention_ext
