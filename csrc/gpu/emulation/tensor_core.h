// How tensor cores add. The exact products of a block of terms and C are aligned with the largest of them, what lies
// below is cut off, and so is their sum, to float. Fasi et al., "Numerical behavior of NVIDIA tensor cores" (PeerJ
// CS 330); Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores" (arXiv 2512.07004); Xie et al., "MMA-Sim"
// (arXiv 2511.10909).
#pragma once

namespace attention_ext::emulation {

struct TensorCore {
  int block_bytes;           // of a row's operands that are added at once; 0: every sum is rounded to nearest
  int extra_bits;            // which alignment keeps below the 24 of a float
  bool wide_double = false;  // products of 16 x 8 x 8 doubles by one instruction

  static TensorCore named(const char* name);  // "sm_80", "sm_90" or "nearest"
};

constexpr TensorCore kSm80{16, 1}, kSm90{32, 2, true}, kNearest{0, 0, true};

struct OperandType {
  int rows, depth, bytes;
  int least_exponent;  // of float and narrower: subnormal numbers are aligned as if they had it
};

// C (rows x 8) += A (rows x depth) B (depth x 8)
template <class Number>
struct Operands {
  static constexpr int kMostRows = 16, kColumns = 8, kMostDepth = 16;
  Number a[kMostRows][kMostDepth], b[kMostDepth][kColumns], c[kMostRows][kColumns];
};

void multiply(const TensorCore& core, const OperandType& type, Operands<float>& x);

// Each product is added by one fma, on every GPU.
void multiply(const TensorCore& core, const OperandType& type, Operands<double>& x);

}  // namespace attention_ext::emulation
