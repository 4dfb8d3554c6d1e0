// Eight elements of a task vector and what a rule keeps of them; only .cu files include this.
// Eight share a Philox block, a byte of a stored mask and, of 16-bit tensors, a wide load.
#pragma once

#include "common.cuh"
#include "merge_deltas.cuh"

namespace mk::cuda {

constexpr int kEight = 8;

template <class T>
using Eight = Pack<T, kEight>;

// Elements from `at` on; zeros past the end.
template <class T>
__device__ inline Eight<T> read_eight(const void* address, std::int64_t at, std::int64_t numel,
                                      bool wide) {
  const T* p = global(static_cast<const T*>(address)) + at;
  Eight<T> x;
  if (wide && numel - at >= kEight) {
    x.read(p);
  } else {
#pragma unroll
    for (int j = 0; j < kEight; ++j) x.v[j] = at + j < numel ? p[j] : T{};
  }
  return x;
}

__device__ inline std::uint32_t key_of(float x) {
  const std::uint32_t bits = __float_as_uint(x) & 0x7fffffffu;
  return bits < kNanKey32 ? bits : kNanKey32;
}
__device__ inline std::uint64_t key_of(double x) {
  const std::uint64_t bits = std::uint64_t(__double_as_longlong(x)) & ~(std::uint64_t(1) << 63);
  return bits < kNanKey64 ? bits : kNanKey64;
}

// x, rounded to T where every step is.
template <class T, bool kRounded>
__device__ inline acc_t<T> step(acc_t<T> x) {
  if (!kRounded) return x;
  T narrow;
  store(x, &narrow);
  return load(narrow);
}

// A Philox block: the eight draws of 16 bits, the first in the low half of the first word.
__device__ inline void draw_eight(std::uint64_t key0, std::uint64_t key1, std::uint64_t counter,
                                  std::uint32_t (&words)[4]) {
  std::uint32_t c0 = std::uint32_t(counter), c1 = std::uint32_t(counter >> 32), c2 = 0, c3 = 0;
  std::uint32_t k0 = std::uint32_t(key0), k1 = std::uint32_t(key1);
#pragma unroll
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    const std::uint64_t p0 = std::uint64_t(0xd2511f53u) * c0;
    const std::uint64_t p1 = std::uint64_t(0xcd9e8d57u) * c2;
    c0 = std::uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = std::uint32_t(p1);
    c2 = std::uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = std::uint32_t(p0);
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Which of the eight draws of a Philox block are below `limit`, the first in the highest bit.
__device__ inline std::uint32_t drawn_eight(const DeltaRule& rule, std::uint64_t counter) {
  std::uint32_t words[4];
  draw_eight(rule.k0, rule.k1, counter, words);
  const std::uint32_t limit = std::uint32_t(rule.limit);
  std::uint32_t kept = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w)
    kept = kept << 2 | ((words[w] & 0xffffu) < limit) << 1 | ((words[w] >> 16) < limit);
  return kept;
}

// What the rule keeps of elements [at, at + 8), the first in the highest of eight bits, as
// numpy.packbits has it.
template <class A>
__device__ inline std::uint32_t kept_eight(const DeltaRule& rule, const A (&d)[kEight],
                                           std::int64_t at, std::int64_t numel) {
  switch (Keep(rule.kind)) {
    case Keep::interval: {
      std::uint32_t kept = 0;
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        const key_t<A> key = key_of(d[j]);
        const bool above = key >= key_t<A>(rule.low) + (at + j >= rule.low_cut);
        const bool below = key < key_t<A>(rule.high) + (at + j >= rule.high_cut);
        kept = kept << 1 | (above && below);
      }
      return kept;
    }
    case Keep::random: {
      const std::int64_t first = rule.first + at;
      const std::uint32_t kept = drawn_eight(rule, std::uint64_t(first) / kEight);
      const int in = int(first % kEight);
      if (in == 0) return kept;
      const std::uint32_t next = drawn_eight(rule, std::uint64_t(first) / kEight + 1);
      return (kept << 8 | next) << in >> 8 & 0xffu;
    }
    case Keep::bits:
      return at < numel ? global(rule.bits)[at / kEight] : 0u;
    case Keep::all:
      break;
  }
  return 0xffu;
}

__device__ inline bool bit_of(std::uint32_t kept, int j) { return kept >> (kEight - 1 - j) & 1u; }

// d = x - base.
template <class T, bool kRounded>
__device__ inline void difference(const Eight<T>& x, const Eight<T>& base, bool based,
                                  acc_t<T> (&d)[kEight]) {
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    d[j] = load(x.v[j]);
    if (based) d[j] = step<T, kRounded>(add(d[j], -load(base.v[j])));
  }
}

}  // namespace mk::cuda
