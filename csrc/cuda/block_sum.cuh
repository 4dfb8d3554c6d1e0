// Sums over neighbouring threads in one fixed order; only .cu files include this.
#pragma once

#include "common.cuh"

namespace mk::cuda {

// The sum over each `lanes` threads of a warp, a power of two; all of them have it.
template <class V>
__device__ inline V lane_sum(V v, int lanes = 32) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2)
    if (by < lanes) v += __shfl_xor_sync(~0u, v, by);
  return v;
}

// The sum over a block of kThreads; all of them have it. Takes kWarps of V in dynamic shared
// memory.
constexpr int kWarps = kThreads / 32;

template <class V>
__device__ inline V block_sum(V v) {
  V* shared = dynamic_shared<V>();
  v = lane_sum(v);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) v += shared[w];
  __syncthreads();
  return v;
}

// The sum over the lanes up to and with this one.
template <class V>
__device__ inline V scan_warp(V v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const V before = __shfl_up_sync(~0u, v, by);
    if (lane >= by) v += before;
  }
  return v;
}

// The sum over the threads of a block up to and with this one; `totals` has room for its warps.
template <class V>
__device__ inline V scan_block(V v, V* totals) {
  const int warp = threadIdx.x / 32;
  v = scan_warp(v);
  __syncthreads();  // who reads the totals of the scan before
  if (threadIdx.x % 32 == 31) totals[warp] = v;
  __syncthreads();
  for (int w = 0; w < warp; ++w) v += totals[w];
  return v;
}

}  // namespace mk::cuda
