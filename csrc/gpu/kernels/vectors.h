// A lane's numbers of 16 rows of a block of scores as one vector, so that core/score_mods.h decides once for all of
// them which mods are there.
#pragma once

#include "core/score_mods.h"
#include "gpu/kernels/products.h"

namespace attention_ext {
namespace {

// As for each_number: number 4 n + i is number i of fragment n.
template <class T, int kCount>
struct Vector {
  T number[kCount];

  template <class F>
  ATTENTION_DEVICE static Vector of(F&& f) {
    Vector v;
    ATTENTION_UNROLL
    for (int i = 0; i < kCount; ++i) v.number[i] = f(i);
    return v;
  }
  ATTENTION_DEVICE friend Vector operator+(const Vector& a, const Vector& b) {
    return of([&](int i) { return a.number[i] + b.number[i]; });
  }
  ATTENTION_DEVICE friend Vector operator-(const Vector& a, const Vector& b) {
    return of([&](int i) { return a.number[i] - b.number[i]; });
  }
  ATTENTION_DEVICE friend Vector operator-(const Vector& a) {
    return of([&](int i) { return -a.number[i]; });
  }
  ATTENTION_DEVICE friend Vector operator*(const Vector& a, const Vector& b) {
    return of([&](int i) { return a.number[i] * b.number[i]; });
  }
  using Flags = Vector<bool, kCount>;
  ATTENTION_DEVICE friend Flags operator<(const Vector& a, const Vector& b) {
    return Flags::of([&](int i) { return a.number[i] < b.number[i]; });
  }
  ATTENTION_DEVICE friend Flags operator<=(const Vector& a, const Vector& b) {
    return Flags::of([&](int i) { return a.number[i] <= b.number[i]; });
  }
  ATTENTION_DEVICE friend Flags operator>(const Vector& a, const Vector& b) { return b < a; }
  ATTENTION_DEVICE friend Flags operator>=(const Vector& a, const Vector& b) { return b <= a; }
  ATTENTION_DEVICE friend Flags operator!=(const Vector& a, const Vector& b) {
    return Flags::of([&](int i) { return a.number[i] != b.number[i]; });
  }
  ATTENTION_DEVICE friend Vector operator&(const Vector& a, const Vector& b) {
    return of([&](int i) { return a.number[i] && b.number[i]; });
  }
  ATTENTION_DEVICE friend Vector operator|(const Vector& a, const Vector& b) {
    return of([&](int i) { return a.number[i] || b.number[i]; });
  }
};

template <class T, int kTiles>
struct VectorOps {
  using V = Vector<T, 4 * kTiles>;
  using Mask = Vector<bool, 4 * kTiles>;

  ATTENTION_DEVICE static V splat(double x) {
    return V::of([&](int) { return static_cast<T>(x); });
  }
  ATTENTION_DEVICE static V abs(const V& x) {
    return V::of([&](int i) { return larger(x.number[i], -x.number[i]); });
  }
  ATTENTION_DEVICE static V tanh(const V& x) {
    return V::of([&](int i) { return tanh_of(x.number[i]); });
  }
  ATTENTION_DEVICE static V select(const Mask& mask, const V& a, const V& b) {
    return V::of([&](int i) { return mask.number[i] ? a.number[i] : b.number[i]; });
  }
  // f(n, i) for each number
  template <class F>
  ATTENTION_DEVICE static V of(F&& f) {
    V v;
    for_each_number<kTiles>([&](int n, int i) { v.number[4 * n + i] = f(n, i); });
    return v;
  }
};

}  // namespace
}  // namespace attention_ext
