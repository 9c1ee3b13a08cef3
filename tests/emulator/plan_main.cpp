// How many blocks of threads and how much memory passes plan, on any number of multiprocessors.
#include <cstdio>

#include "gpu/kernels/decode.h"
#include "gpu/kernels/forward.h"
#include "gpu/kernels/query_gradient.h"
#include "gpu/reasons.h"

namespace {

using namespace attention_ext;

int wrong = 0;

void expect(bool holds, const char* what, const AttentionProblem& p) {
  if (holds) return;
  std::printf("%s: batch %lld, heads %lld/%lld, %lld queries, %lld keys, %lld multiprocessors\n", what,
              static_cast<long long>(p.batch), static_cast<long long>(p.heads), static_cast<long long>(p.kv_heads),
              static_cast<long long>(p.seqlen_q), static_cast<long long>(p.seqlen_k),
              static_cast<long long>(p.multiprocessors));
  ++wrong;
}

AttentionProblem problem_of(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys,
                            int multiprocessors) {
  AttentionProblem p;
  p.batch = batch;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.seqlen_q = p.max_seqlen_q = queries;
  p.seqlen_k = p.max_seqlen_k = keys;
  p.head_dim = p.head_dim_v = 128;
  p.dtype = DType::kBFloat16;
  p.multiprocessors = multiprocessors;
  return p;
}

// All that is known of the lengths is their totals: a plan that reads cu_seqlens would crash.
AttentionProblem packed(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys,
                        int multiprocessors) {
  AttentionProblem p = problem_of(batch, heads, kv_heads, batch * queries, batch * keys, multiprocessors);
  p.cu_seqlens_q = p.cu_seqlens_k = reinterpret_cast<const int64_t*>(sizeof(int64_t));
  return p;
}

Plan plan_of(const AttentionProblem& p) {
  using C = Compute16<BFloat16>;
  return not_decoding(p) ? plan_forward_by_shape<C>(p) : plan_decode_by_shape<C>(p);
}

int64_t blocks_of(const AttentionProblem& p) { return plan_of(p).phases[0].jobs; }

AttentionProblem in_parts(AttentionProblem p, int64_t parts) {
  p.key_parts = parts;
  return p;
}

// Tiles whose keys are in parts may be half as high as others.
int64_t parts_of(const AttentionProblem& p) {
  const Plan plan = plan_of(p);
  return plan.phase_count == 1 ? 1 : plan.phases[0].jobs / (blocks_of(in_parts(p, 2)) / 2);
}

// Keys are split if and only if the tiles are fewer than 0.8 of the multiprocessors, and into no more parts than these
// have room for, with two tiles on each.
void check_split(const AttentionProblem& p) {
  const Plan plan = plan_of(p);
  const int64_t tiles = blocks_of(in_parts(p, 1)), blocks = plan.phases[0].jobs;
  const bool few = static_cast<double>(tiles) < 0.8 * static_cast<double>(p.multiprocessors);
  expect((blocks > tiles) == few, "keys are split where tiles are enough, or are not where they are few", p);
  expect(plan.phase_count == (few ? 2 : 1), "parts are merged by a second launch, if there are any", p);
  expect((plan.shared_bytes > 0) == few, "parts have a workspace, if there are any", p);
  expect(!few || parts_of(p) * tiles <= 2 * p.multiprocessors, "too many parts", p);
  expect(!few || blocks >= minimum<int64_t>(p.multiprocessors, tiles * (p.max_seqlen_k / kKeysForPart)),
         "multiprocessors without a block", p);
  expect(parts_of(in_parts(p, 5)) == 5, "not the number of parts that was asked for", p);
  AttentionProblem dropping = p;
  dropping.dropout_p = 0.1;
  expect(parts_of(dropping) == parts_of(p), "dropout changes the parts, and with them logsumexp", p);
}

void check_all(int multiprocessors) {
  for (const int64_t batch : {1, 3, 16}) {
    for (const int64_t kv_heads : {1, 8}) {
      for (const int64_t group : {1, 3, 8, 24}) {
        for (const int64_t queries : {1, 4, 16, 17, 128, 1000}) {
          for (const int64_t keys : {257, 1000, 8192, 65536}) {
            check_split(problem_of(batch, kv_heads * group, kv_heads, queries, keys, multiprocessors));
            check_split(packed(batch, kv_heads * group, kv_heads, queries, keys, multiprocessors));
          }
        }
      }
    }
  }
}

// The workspace grows with the queries that there are, not with the batch times all of them.
void check_workspace(int multiprocessors) {
  for (const int64_t kv_heads : {1, 4, 8, 32}) {
    for (const int64_t queries : {1, 4}) {
      const AttentionProblem p = packed(16, 32, kv_heads, queries, 8192, multiprocessors);
      expect(plan_of(p).shared_bytes < 80e6, "more than 80 MB", p);
    }
  }
}

void check_windows() {
  AttentionProblem p = problem_of(1, 8, 8, 1, 65536, 132);
  p.window_left = 500;
  p.window_right = 0;
  expect(blocks_of(p) == 2 * 8, "parts of a window are cut from all keys", p);
}

// grad_query is split as forward passes are, but not beside gradients of slopes.
void check_gradients() {
  using Queries = QueryGradient<Compute16<BFloat16>, 128, ScoreMode::kAll, Order::kFirst>;
  BackwardProblem p;
  static_cast<AttentionProblem&>(p) = problem_of(1, 8, 8, 128, 65536, 132);
  expect(Queries::blocks(p) == 2 * 132 / 16 * 16, "grad_query leaves multiprocessors without a block", p);
  expect(BackwardMemory<float>::bytes(p, Queries::tiles(p), Queries::parts(p)) ==
             2 * 4096 + 16 * 1024 * 128 * sizeof(float),
         "the workspace does not hold the parts", p);
  double slopes = 0;
  p.grad_alibi_slopes = &slopes;
  expect(Queries::blocks(p) == 16, "keys are split beside gradients of slopes", p);
  p.grad_alibi_slopes = nullptr;
  static_cast<AttentionProblem&>(p) = problem_of(8, 8, 8, 128, 65536, 132);
  expect(Queries::blocks(p) == 128, "grad_query splits keys where tiles are enough", p);
}

}  // namespace

int main() {
  for (const int multiprocessors : {1, 16, 108, 132, 148}) check_all(multiprocessors);
  for (const int multiprocessors : {16, 108, 132, 148, 1000}) check_workspace(multiprocessors);
  check_windows();
  check_gradients();
  const AttentionProblem few_tiles = problem_of(1, 8, 8, 128, 65536, 132);
  expect(blocks_of(few_tiles) >= 132, "multiprocessors without a block", few_tiles);
  const AttentionProblem group = problem_of(1, 32, 4, 1, 8192, 4);
  expect(blocks_of(group) == 4, "keys are read more than once a group", group);
  const AttentionProblem none = problem_of(0, 8, 8, 1, 8192, 132);
  expect(blocks_of(none) == 0, "blocks without a tile", none);
  return wrong > 0;
}
