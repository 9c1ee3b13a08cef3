// The products of products.h on the emulated warp layer, and the model of tensor cores with any parameters.
#include "gpu/emulation/access_log.cpp"
#include "gpu/emulation/block.cpp"
#include "gpu/emulation/tensor_core.cpp"
#include "products.h"

using namespace attention_ext;

// As in probes.cu.
extern "C" int multiply_many(int bytes, int is_bfloat16, int64_t count, const float* a, const float* b, float* c) {
  struct Argument {
    int bytes;
    bool is_bfloat16;
    int64_t index;
    const float *a, *b;
    float* c;
  } argument{bytes, is_bfloat16 != 0, 0, a, b, c};
  for (; argument.index < count; ++argument.index) {
    emulation::Block::run(0, kWarpSize, 0, &argument, [](void* given) {
      const auto* x = static_cast<Argument*>(given);
      multiply_one(x->bytes, x->is_bfloat16, x->index, x->a, x->b, x->c);
    });
  }
  return 0;
}

// a (count x 16 x depth), b (count x depth x 8), c (count x 16 x 8)
extern "C" void model(int block_bytes, int extra_bits, int bytes, int least_exponent, int64_t count, const float* a,
                      const float* b, float* c) {
  const int depth = 32 / bytes;
  for (int64_t index = 0; index < count; ++index) {
    emulation::Operands<float> x{};
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < depth; ++k) x.a[m][k] = *a++;
    }
    for (int k = 0; k < depth; ++k) {
      for (int n = 0; n < 8; ++n) x.b[k][n] = *b++;
    }
    float* sums = c + index * 16 * 8;
    for (int i = 0; i < 16 * 8; ++i) x.c[i / 8][i % 8] = sums[i];
    emulation::multiply({block_bytes, extra_bits}, {16, depth, bytes, least_exponent}, x);
    for (int i = 0; i < 16 * 8; ++i) sums[i] = x.c[i / 8][i % 8];
  }
}
