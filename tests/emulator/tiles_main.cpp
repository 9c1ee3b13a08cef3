// Every tile of every packed sequence belongs to exactly one thread block, for any lengths.
#include <cstdio>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "gpu/kernels/sequence_tiles.h"

namespace {

using attention_ext::AttentionProblem;
using attention_ext::ceil_div;
using attention_ext::SequenceTile;
using attention_ext::SequenceTiles;

int wrong = 0;

void expect(bool holds, const char* what, int64_t rows) {
  if (holds) return;
  std::printf("%s, with tiles of %lld rows\n", what, static_cast<long long>(rows));
  ++wrong;
}

AttentionProblem packed(const std::vector<int64_t>& cu_seqlens) {
  AttentionProblem p;
  p.batch = static_cast<int64_t>(cu_seqlens.size()) - 1;
  p.cu_seqlens_q = cu_seqlens.data();
  p.seqlen_q = p.max_seqlen_q = cu_seqlens.back();  // the longest sequence is not known
  return p;
}

void check(const AttentionProblem& p, const std::vector<int64_t>& lengths, int64_t rows) {
  const SequenceTiles tiles = SequenceTiles::of_queries(p, rows);
  std::set<std::pair<int64_t, int64_t>> owned;
  for (int64_t i = 0; i < tiles.count(); ++i) {
    const SequenceTile tile = tiles.at({i / tiles.places(), i % tiles.places()});
    expect(owned.emplace(tile.batch, tile.index).second, "two blocks own one tile", rows);
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t index = 0; index < ceil_div(lengths[b], rows); ++index) {
      expect(owned.count({b, index}) == 1, "no block owns a tile", rows);
      const SequenceTile back = tiles.at(tiles.of({b, index}));
      expect(back.batch == b && back.index == index, "of() is not the inverse of at()", rows);
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (int round = 0; round < 300; ++round) {
    const int64_t batch = 1 + static_cast<int64_t>(random() % 20);
    std::vector<int64_t> lengths, cu_seqlens{0};
    for (int64_t b = 0; b < batch; ++b) {
      lengths.push_back(static_cast<int64_t>(random() % 3 == 0 ? 0 : random() % 300));
      cu_seqlens.push_back(cu_seqlens.back() + lengths.back());
    }
    for (const int64_t rows : {1, 4, 64, 128}) {
      AttentionProblem p = packed(cu_seqlens);
      check(p, lengths, rows);
      expect(SequenceTiles::of_queries(p, rows).count() <= p.seqlen_q / rows + batch, "blocks without a tile", rows);
      p.cu_seqlens_q = nullptr;
      check(p, std::vector<int64_t>(batch, p.seqlen_q), rows);
    }
    // cu_seqlens on a GPU are not validated.
    for (int64_t& x : cu_seqlens) x = static_cast<int64_t>(random() % 2000) - 500;
    AttentionProblem p = packed(cu_seqlens);
    p.seqlen_q = p.max_seqlen_q = 1000;
    const SequenceTiles tiles = SequenceTiles::of_queries(p, 64);
    for (int64_t i = 0; i < tiles.count(); ++i) {
      const SequenceTile tile = tiles.at({i / tiles.places(), i % tiles.places()});
      expect(tile.batch >= 0 && tile.batch < batch && tile.index >= 0, "a tile lies outside the batch", 64);
    }
  }
  return wrong > 0;
}
