// CUDA's vectors and the intrinsics of one thread, with the bits that a GPU gives. The files are
// compiled with -ffp-contract=off and round to nearest.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../../csrc/common.h"

#define MK_VECTOR(T, name, bytes)                \
  struct alignas(bytes / 2) name##2 { T x, y; }; \
  struct alignas(bytes > 16 ? 16 : bytes) name##4 { T x, y, z, w; };
MK_VECTOR(unsigned char, uchar, 4)
MK_VECTOR(unsigned short, ushort, 8)
MK_VECTOR(unsigned, uint, 16)
MK_VECTOR(int, int, 16)
MK_VECTOR(float, float, 16)
MK_VECTOR(double, double, 32)
MK_VECTOR(long long, longlong, 32)
MK_VECTOR(unsigned long long, ulonglong, 32)
#undef MK_VECTOR

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- bits ---------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float x) { return mk::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return mk::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return mk::bit_cast<float>(x); }
inline float __int_as_float(int x) { return mk::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return mk::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return mk::bit_cast<double>(x); }

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((std::uint64_t(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)(((unsigned __int128)(a)*b) >> 64);
}
// Byte i of the result is the one of the eight of (b, a) that nibble i of s names.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  const std::uint64_t bytes = std::uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (s >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

// ---- arithmetic: the one NaN of a GPU's float instructions is 0x7fffffff ------------------------

namespace host_cuda {
inline float canonical(float x) { return x == x ? x : __uint_as_float(0x7fffffffu); }
}  // namespace host_cuda

inline float __fadd_rn(float a, float b) { return host_cuda::canonical(a + b); }
inline float __fsub_rn(float a, float b) { return host_cuda::canonical(a - b); }
inline float __fmul_rn(float a, float b) { return host_cuda::canonical(a * b); }
inline float __fdiv_rn(float a, float b) { return host_cuda::canonical(a / b); }
inline float __fsqrt_rn(float a) { return host_cuda::canonical(std::sqrt(a)); }
inline float __fmaf_rn(float a, float b, float c) {
  return host_cuda::canonical(std::fma(a, b, c));
}
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

inline float __double2float_rn(double x) { return host_cuda::canonical(float(x)); }
inline float __double2float_rz(double x) {
  const float y = __double2float_rn(x);
  const bool away = std::fabs(double(y)) > std::fabs(x);
  return away ? __uint_as_float(__float_as_uint(y) - 1) : y;
}

// ---- accesses with a hint -----------------------------------------------------------------------

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}
