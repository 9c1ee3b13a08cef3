// The warp layer on a CPU: every thread of a block is a fiber, and fibers meet at warp collectives and barriers.
//
// It is meaner than a GPU: shared memory starts as NaN, and the target of an asynchronous copy is NaN until the
// matching wait. A barrier or a wait that is missing is an error, found by who read and wrote what since the last
// barrier.
#pragma once

#include <cmath>
#include <cstring>

#include "core/plan.h"
#include "gpu/emulation/block.h"
#include "gpu/emulation/fragments.h"
#include "gpu/plan.h"

#define ATTENTION_DEVICE inline
#define ATTENTION_UNROLL
#define ATTENTION_UNROLL_BY(count)

namespace attention_ext {

// Threads

inline int thread_index() { return emulation::current->thread(); }
inline int reread_thread_index() { return thread_index(); }
inline int64_t block_index() { return emulation::current->index(); }
inline int in_register(int x) { return x; }
inline void synchronize_block() { emulation::current->barrier(); }

inline bool any_in_warp(bool flag) {
  emulation::current->collective("any", &flag, [](void* const* lanes) {
    bool any = false;
    for (int lane = 0; lane < kWarpSize; ++lane) any |= *static_cast<bool*>(lanes[lane]);
    for (int lane = 0; lane < kWarpSize; ++lane) *static_cast<bool*>(lanes[lane]) = any;
  });
  return flag;
}

template <class T>
T shuffle_xor(T value, int mask) {
  struct Argument {
    T value;
    int mask;
  } argument{value, mask};
  emulation::current->collective("shuffle", &argument, [](void* const* lanes) {
    T before[kWarpSize];
    for (int lane = 0; lane < kWarpSize; ++lane) before[lane] = static_cast<Argument*>(lanes[lane])->value;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      auto* argument = static_cast<Argument*>(lanes[lane]);
      argument->value = before[lane ^ argument->mask];
    }
  });
  return argument.value;
}

// Shared memory

inline char* shared_memory() { return emulation::current->shared_memory(); }
template <class T>
T load_shared(const T* from) {
  emulation::current->read_shared("a load", from, sizeof(T), thread_index());
  return *from;
}
template <class T>
void store_shared(T* to, T value) {
  emulation::current->write_shared("a store", to, sizeof(T));
  *to = value;
}

using SharedAddress = uint32_t;  // in bytes

inline SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(static_cast<const char*>(pointer) - shared_memory());
}
template <class T>
const T* shared_pointer(SharedAddress address) {
  return reinterpret_cast<const T*>(shared_memory() + address);
}
inline void copy_async(SharedAddress to, const void* from, int bytes) {
  emulation::current->copy_async(shared_memory() + to, from, bytes);
}
inline void commit_copies() { emulation::current->commit_copies(); }
template <int kPending>
void wait_copies() {
  emulation::current->wait_copies(kPending);
}

inline void load_matrices(uint32_t (&to)[4], SharedAddress row) {
  emulation::load_matrices<false>(to, shared_memory() + row);
}
inline void load_matrices_transposed(uint32_t (&to)[4], SharedAddress row) {
  emulation::load_matrices<true>(to, shared_memory() + row);
}

// Matrix products

template <class E>
void multiply_16x8x16(E, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply<emulation::Shape16x8x16<E>>(c, a, b);
}
inline void multiply_16x8x8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply<emulation::Shape16x8x8<uint32_t>>(c, a, b);
}
inline void multiply_8x8x4(double& c0, double& c1, double a, double b) {
  double c[2] = {c0, c1};
  const double a_fragment[1] = {a}, b_fragment[1] = {b};
  emulation::multiply<emulation::Shape8x8x4>(c, a_fragment, b_fragment);
  c0 = c[0];
  c1 = c[1];
}
inline void multiply_16x8x8(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
  if (emulation::current->tensor_core().wide_double) {
    emulation::multiply<emulation::Shape16x8x8<double>>(c, a, b);
  } else {
    for (int k = 0; k < 2; ++k) {
      multiply_8x8x4(c[0], c[1], a[2 * k], b[k]);
      multiply_8x8x4(c[2], c[3], a[2 * k + 1], b[k]);
    }
  }
}

// Numbers

template <class E>
uint32_t narrow_pair(E, float first, float second) {
  return narrow(E{}, first).bits | static_cast<uint32_t>(narrow(E{}, second).bits) << 16;
}

// Ties go away from zero, as cvt.rna has it.
inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = bits_of(x);
  return x - x == 0 ? (bits + 0x1000u) & ~0x1FFFu : bits;
}

inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

template <class T>
T larger(T a, T b) {
  return a > b || b != b ? a : b;
}
template <class T>
T exp2_of(T x) {
  return std::exp2(x);
}
template <class T>
T log2_of(T x) {
  return std::log2(x);
}
template <class T>
T tanh_of(T x) {
  return std::tanh(x);
}
template <class T>
T multiply_add(T a, T b, T c) {
  return std::fma(a, b, c);
}

// Launches

template <class Kernel>
void run_block(const AttentionProblem& problem, void* shared, void*, int64_t job) {
  struct Call {
    const typename Kernel::Problem& problem;
    void* workspace;
  } call{static_cast<const typename Kernel::Problem&>(problem), shared};
  emulation::Block::run(job, Kernel::kThreads, Kernel::kSharedBytes, &call, [](void* argument) {
    const auto* call = static_cast<Call*>(argument);
    Kernel::run(call->problem, call->workspace);
  });
}

// A launch is a phase, a block one of its jobs, and the workspace the memory that jobs share.
using KernelPlan = Plan;

template <class Kernel>
void add_launch(KernelPlan& plan, int64_t blocks) {
  static_assert(Kernel::kSharedBytes <= kMostSharedBytes);
  plan.phases[plan.phase_count++] = {blocks, run_block<Kernel>};
}

inline void add_launches(KernelPlan& plan, const KernelPlan& more) {
  for (int i = 0; i < more.phase_count; ++i) plan.phases[plan.phase_count++] = more.phases[i];
}

inline void set_workspace(KernelPlan& plan, size_t bytes) { plan.shared_bytes = bytes; }

}  // namespace attention_ext
