// Blocks of threads take every tile once, and section by section of heads whose streamed rows fit the cache.
#include <cstdio>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "gpu/kernels/group_tiles.h"

namespace {

using namespace attention_ext;

constexpr int kRows = 16;
int wrong = 0;

struct Owned {
  int64_t batch, kv_head, lane, tile;  // lane: of those that share the rows of the key head
};

void expect(bool holds, const char* what, const AttentionProblem& p) {
  if (holds) return;
  std::printf("%s: batch %lld, heads %lld/%lld, %lld queries, %lld keys, a cache of %lld bytes\n", what,
              static_cast<long long>(p.batch), static_cast<long long>(p.heads), static_cast<long long>(p.kv_heads),
              static_cast<long long>(p.seqlen_q), static_cast<long long>(p.seqlen_k),
              static_cast<long long>(p.l2_bytes));
  ++wrong;
}

// owned(index): what the block owns. bytes: that the tiles of one key head stream. A section is walked while any of its
// heads has tiles left.
template <class F>
void check(const AttentionProblem& p, int64_t blocks, int64_t tiles, int64_t bytes, bool last_first, F&& owned) {
  using Head = std::pair<int64_t, int64_t>;
  std::set<std::tuple<int64_t, int64_t, int64_t, int64_t>> seen;
  std::map<Head, int64_t> left;
  const int64_t blocks_of_head = blocks / (p.batch * p.kv_heads);
  const int64_t most = maximum<int64_t>(1, int64_t{p.l2_bytes} / 8 * 5 / bytes);
  int64_t sections = 0, widest = 0, tile = 0, in_section = 0;
  for (int64_t index = 0; index < blocks; ++index) {
    const Owned x = owned(index);
    expect(seen.emplace(x.batch, x.kv_head, x.lane, x.tile).second, "two blocks own one tile", p);
    expect(x.batch < p.batch && x.kv_head < p.kv_heads && x.tile >= 0 && x.tile < tiles, "no such tile", p);
    if (left.empty()) {
      ++sections;
      in_section = 0;
    } else {
      expect(last_first ? x.tile <= tile : x.tile >= tile, "the longest tiles do not come first", p);
    }
    tile = x.tile;
    const Head head{x.batch, x.kv_head};
    if (left.emplace(head, blocks_of_head).second) widest = maximum(widest, ++in_section);
    if (--left[head] == 0) left.erase(head);
  }
  if (tiles <= 1) return;  // no section can be told from the next
  expect(widest <= most, "the heads of a section do not fit the cache", p);
  expect(widest == ceil_div(p.batch * p.kv_heads, sections), "sections are uneven", p);
  expect(sections == ceil_div(p.batch * p.kv_heads, most), "not as few sections as fit", p);
}

template <class ProblemType>
void check_all(const ProblemType& p, int64_t factor) {
  const int64_t row = (p.head_dim + p.head_dim_v) * 4 * factor, group = p.group_size();
  check(p, QueryTileIndex::count(p, kRows), ceil_div(p.seqlen_q, kRows), p.seqlen_k * row, true, [&](int64_t index) {
    const QueryTileIndex at(p, kRows, index);
    return Owned{at.batch, at.head / group, at.head % group, at.tile};
  });
  check(p, KeyTileIndex::count(p, kRows), ceil_div(p.seqlen_k, kRows), p.seqlen_q * group * row, false,
        [&](int64_t index) {
          const KeyTileIndex at(p, kRows, index);
          return Owned{at.batch, at.kv_head, 0, at.tile};
        });
  if (factor > 1) return;  // the kernel for decoding has no second order
  const GroupTiles cut(p);
  check(p, GroupTiles::count(p), ceil_div(p.seqlen_q, cut.queries), p.seqlen_k * row, true, [&](int64_t index) {
    const GroupTile at(p, index);
    return Owned{at.batch, at.first_head / group, at.first_head % group, at.queries.begin / cut.queries};
  });
}

template <class ProblemType>
void check_sizes(int64_t factor) {
  for (const int64_t batch : {1, 3, 7}) {
    for (const int64_t kv_heads : {1, 2, 5}) {
      for (const int64_t group : {1, 3, 19}) {
        for (const int64_t queries : {1, 33, 100}) {
          for (const int64_t keys : {17, 150}) {
            for (const int l2_bytes : {1, 20000, 100000, 500000, 50000000}) {
              ProblemType p;
              p.batch = batch;
              p.kv_heads = kv_heads;
              p.heads = kv_heads * group;
              p.seqlen_q = p.max_seqlen_q = queries;
              p.seqlen_k = p.max_seqlen_k = keys;
              p.head_dim = 8;
              p.head_dim_v = 16;
              p.l2_bytes = l2_bytes;
              check_all(p, factor);
            }
          }
        }
      }
    }
  }
}

// Every number of a tile is its own, whichever block owns the tile.
void check_numbers(const AttentionProblem& p) {
  std::set<int64_t> numbers;
  const int64_t count = QueryTileIndex::count(p, kRows);
  for (int64_t index = 0; index < count; ++index) {
    const QueryTileIndex at(p, kRows, index);
    expect(at.number < count && numbers.insert(at.number).second, "two tiles have one number", p);
    const Head head(p, at.batch, at.head);
    if (at.queries(head.sequence, kRows).empty()) continue;
    expect(QueryTileIndex::number_of(p, kRows, head, at.tile) == at.number, "number_of() is another number", p);
  }
}

}  // namespace

int main() {
  check_sizes<AttentionProblem>(1);
  check_sizes<JvpProblem>(2);
  AttentionProblem p;
  p.batch = 3;
  p.kv_heads = 5;
  p.heads = 10;
  p.head_dim = p.head_dim_v = 64;
  p.seqlen_q = p.max_seqlen_q = p.seqlen_k = p.max_seqlen_k = 200;
  check_numbers(p);
  const int64_t cu_seqlens[] = {0, 150, 150, 193};
  p.cu_seqlens_q = p.cu_seqlens_k = cu_seqlens;
  check_numbers(p);
  return wrong > 0;
}
