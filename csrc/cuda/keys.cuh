// Keys of eight neighbours; only .cu files include this.
#pragma once

#include "block_sum.cuh"
#include "deltas.cuh"
#include "kth_magnitude.cuh"

namespace mk::cuda {

enum class Kind { plain, rounded, variance };

template <class T>
using eight_keys = key_t<T>[kEight];

// By the two passes of the definition; the second finds the tensors in the caches.
template <class T>
__device__ inline void variance_eight(const KeyTable& args, const Eight<T>& base, std::int64_t at,
                                      bool wide, acc_t<T> (&v)[kEight]) {
  using A = acc_t<T>;
  const A count = A(args.n);
  A mean[kEight] = {}, d[kEight];
#pragma unroll 1
  for (std::int64_t i = 0; i < args.n; ++i) {
    difference<T, false>(read_eight<T>(args.xs[i], at, args.numel, wide), base, args.base, d);
#pragma unroll
    for (int j = 0; j < kEight; ++j) mean[j] = add(mean[j], d[j]);
  }
#pragma unroll
  for (int j = 0; j < kEight; ++j) mean[j] = div(mean[j], count), v[j] = 0;
#pragma unroll 1
  for (std::int64_t i = 0; i < args.n; ++i) {
    difference<T, false>(read_eight<T>(args.xs[i], at, args.numel, wide), base, args.base, d);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      d[j] = add(d[j], -mean[j]);
      v[j] = add(v[j], mul(d[j], d[j]));
    }
  }
#pragma unroll
  for (int j = 0; j < kEight; ++j) v[j] = div(v[j], count);
}

// Keys of elements [at, at + 8) of a vector, anything past the end.
template <class T, Kind kKind>
__device__ inline void keys_eight(const KeyTable& args, std::int64_t vector, std::int64_t at,
                                  bool wide, eight_keys<T>& keys) {
  acc_t<T> d[kEight];
  Eight<T> base;
  if (args.base) base = read_eight<T>(args.base, at, args.numel, wide);
  if constexpr (kKind == Kind::variance)
    variance_eight<T>(args, base, at, wide, d);
  else
    difference<T, kKind == Kind::rounded>(read_eight<T>(args.xs[vector], at, args.numel, wide),
                                          base, args.base, d);
#pragma unroll
  for (int j = 0; j < kEight; ++j) keys[j] = key_of(d[j]);
}

// A bit for each of elements [at, at + 8) that there is, the first in the lowest.
__device__ inline unsigned present_eight(std::int64_t at, std::int64_t numel) {
  const std::int64_t left = numel - at;
  return left >= kEight ? 0xffu : left > 0 ? (1u << left) - 1 : 0u;
}

// f(null pointer to T, integral constant of Kind)
template <class F>
void with_kind(const KeyTable& args, F&& f) {
  with_type(args.dtype, [&](auto* x) {
    if (args.variance)
      f(x, std::integral_constant<Kind, Kind::variance>());
    else if (args.rounded)
      f(x, std::integral_constant<Kind, Kind::rounded>());
    else
      f(x, std::integral_constant<Kind, Kind::plain>());
  });
}

}  // namespace mk::cuda
