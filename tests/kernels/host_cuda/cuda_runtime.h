// CUDA C++ as a dialect of C++: qualifiers, built-in variables, barriers, warp functions, atomics.
// block.h says how a block runs; arithmetic.h has the intrinsics of one thread.
#pragma once

#include "arithmetic.h"
#include "block.h"
#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __builtin_assume(x) ((void)0)
// The build puts what lies in .bss of a kernel file into a section of its own: see block.cpp.
#define __shared__ static

#define gridDim (host_cuda::grid_dim)
#define blockDim (host_cuda::block_dim)
#define blockIdx (host_cuda::block_index)
#define threadIdx (host_cuda::thread_index)
constexpr int warpSize = 32;

inline bool __isGlobal(const void*) { return true; }

// ---- barriers: a caller's place in the source is its barrier's name -----------------------------

#define MK_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(MK_HERE) { host_cuda::meet_block(0, file, line); }
inline int __syncthreads_count(int predicate, MK_HERE) {
  return host_cuda::meet_block(predicate != 0, file, line);
}
inline int __syncthreads_or(int predicate, MK_HERE) {
  return __syncthreads_count(predicate, file, line) > 0;
}
inline int __syncthreads_and(int predicate, MK_HERE) {
  return __syncthreads_count(predicate == 0, file, line) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, MK_HERE) {
  host_cuda::meet_warp(mask, 0, 0, host_cuda::ballot, file, line);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- warp functions -----------------------------------------------------------------------------

namespace host_cuda {

// Of 32 or 64 bits, as the value of lane `from`.
template <class T>
T taken(unsigned mask, T value, int from, const char* file, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32 or 64 bits");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(mask, bits, from, take, file, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return linear_thread() % warpSize; }

}  // namespace host_cuda

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = warpSize, MK_HERE) {
  const int first = host_cuda::lane() & ~(width - 1);
  return host_cuda::taken(mask, value, first + (from & (width - 1)), file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize, MK_HERE) {
  const int me = host_cuda::lane(), first = me & ~(width - 1);
  return host_cuda::taken(mask, value, me - int(by) < first ? me : me - int(by), file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize, MK_HERE) {
  const int me = host_cuda::lane(), last = me | (width - 1);
  return host_cuda::taken(mask, value, me + int(by) > last ? me : me + int(by), file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = warpSize, MK_HERE) {
  const int me = host_cuda::lane(), last = me | (width - 1);
  return host_cuda::taken(mask, value, (me ^ by) > last ? me : me ^ by, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, MK_HERE) {
  return unsigned(host_cuda::meet_warp(mask, predicate != 0, 0, host_cuda::ballot, file, line));
}
inline int __any_sync(unsigned mask, int predicate, MK_HERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, MK_HERE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, MK_HERE) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return unsigned(host_cuda::meet_warp(mask, bits, 0, host_cuda::match, file, line));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, MK_HERE) {
  return unsigned(host_cuda::meet_warp(mask, value, 0, host_cuda::sum, file, line));
}
inline int __reduce_add_sync(unsigned mask, int value, MK_HERE) {
  return int(__reduce_add_sync(mask, unsigned(value), file, line));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, MK_HERE) {
  return unsigned(host_cuda::meet_warp(mask, value, 0, host_cuda::greatest, file, line));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, MK_HERE) {
  return ~__reduce_max_sync(mask, ~value, file, line);
}

// ---- atomics: one thread runs at a time ---------------------------------------------------------

template <class T>
T host_cuda_exchange(T* p, T value) {
  const T before = *p;
  *p = value;
  return before;
}
#define MK_ATOMIC(name, expression)              \
  template <class T, class V>                    \
  T name(T* p, V given) {                        \
    const T old = *p, value = T(given);          \
    return host_cuda_exchange(p, T(expression)); \
  }
MK_ATOMIC(atomicAdd, old + value)
MK_ATOMIC(atomicSub, old - value)
MK_ATOMIC(atomicMax, old > value ? old : value)
MK_ATOMIC(atomicMin, old < value ? old : value)
MK_ATOMIC(atomicOr, old | value)
MK_ATOMIC(atomicAnd, old& value)
MK_ATOMIC(atomicXor, old ^ value)
MK_ATOMIC(atomicExch, (void(old), value))
template <class T>
T atomicCAS(T* p, T expected, T value) {
  return host_cuda_exchange(p, *p == expected ? value : *p);
}
#undef MK_ATOMIC
#undef MK_HERE
