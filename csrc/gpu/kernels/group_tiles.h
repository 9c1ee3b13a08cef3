// Tiles whose rows are queries of all heads of a group: the heads that share keys and values.
#pragma once

#include "gpu/kernels/key_parts.h"

namespace attention_ext {
namespace {

// How the queries of a group of heads are cut into tiles of up to 16 rows: row r is query r / heads of head r % heads
// of the tile. Groups of more heads are cut into runs of 16 heads.
struct GroupTiles {
  int heads, queries;   // of a tile
  int64_t group, runs;  // of heads

  ATTENTION_INLINE explicit GroupTiles(const AttentionProblem& p) : group(p.kv_heads > 0 ? p.group_size() : 1) {
    heads = static_cast<int>(minimum<int64_t>(group, kFragmentRows));
    queries = kFragmentRows / heads;
    runs = ceil_div(group, heads);
  }

  ATTENTION_INLINE static int64_t count(const AttentionProblem& p) {
    const GroupTiles tiles(p);
    return SequenceTiles::of_queries(p, tiles.queries).count() * p.kv_heads * tiles.runs;
  }
  ATTENTION_INLINE static int64_t parts(const AttentionProblem& p) {
    return count_of_parts(p, count(p), GroupTiles(p).queries);
  }
};

// One of them; the last ones, the longest of a causal call, come first.
struct GroupTile {
  int64_t batch, first_head, last_head;
  int heads;
  Range queries;  // may be empty

  ATTENTION_DEVICE GroupTile(const AttentionProblem& p, int64_t index) {
    const GroupTiles cut(p);
    const SequenceTiles tiles = SequenceTiles::of_queries(p, cut.queries);
    const int64_t keys = seen_rows(p, cut.queries, p.max_seqlen_k), runs = p.kv_heads * cut.runs;
    const TileOrder order(tiles.runs() * p.kv_heads, cut.runs, tiles.places(), keys * streamed_bytes(p),
                          streaming_cache(p));
    const auto [lane, place] = order.at(index);
    const SequenceTile own = tiles.at({lane / runs, tiles.places() - 1 - place});
    const int64_t run = lane % runs;
    batch = own.batch;
    heads = cut.heads;
    first_head = run / cut.runs * cut.group + run % cut.runs * heads;
    last_head = minimum(first_head + heads, (run / cut.runs + 1) * cut.group) - 1;
    queries = {own.index * cut.queries, (own.index + 1) * cut.queries};
  }

  // Rows past the last query or head are not rows of `out`; they take the last head's mods.
  ATTENTION_DEVICE int64_t query(int row) const { return queries.begin + row / heads; }
  ATTENTION_DEVICE int64_t head(int row) const { return minimum(first_head + row % heads, last_head); }
  ATTENTION_DEVICE Range heads_present() const { return {first_head, last_head + 1}; }
  ATTENTION_DEVICE bool has(int row) const { return query(row) < queries.end && first_head + row % heads <= last_head; }
};

}  // namespace
}  // namespace attention_ext
