// The sum of products that weighted_sum and weighted_rows have in common; only .cu files include
// this.
#pragma once

#include "common.cuh"

namespace mk::cuda {

// sum[j] = sum_i factor(i, j) x_i[at + j], each product and each sum rounded, by 16-byte reads.
template <class In, int N, class A, class Factor>
__device__ inline void sum_pack(const In* const* __restrict__ xs, std::int64_t n, std::int64_t at,
                                A (&sum)[N], Factor factor) {
  // Inputs a thread reads before it adds the first of them: 64 bytes in flight.
  constexpr int kBatch = 64 / (N * sizeof(In));
#pragma unroll
  for (int j = 0; j < N; ++j) sum[j] = A(-0.0);  // plus any p is p, also for p = -0
  for (std::int64_t i = 0; i < n; i += kBatch) {
    Pack<In, N> x[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (i + b < n) x[b].read(global(xs[i + b]) + at);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (i + b >= n) break;
      factor.enter(i + b);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] = add(sum[j], mul(A(load(x[b].v[j])), factor.of(j)));
    }
  }
}

// The same of one element.
template <class In, class A, class Factor>
__device__ inline A sum_one(const In* const* __restrict__ xs, std::int64_t n, std::int64_t at,
                            Factor factor) {
  A sum = A(-0.0);
#pragma unroll 4
  for (std::int64_t i = 0; i < n; ++i) {
    factor.enter(i);
    sum = add(sum, mul(A(load(global(xs[i])[at])), factor.of(0)));
  }
  return sum;
}

}  // namespace mk::cuda
