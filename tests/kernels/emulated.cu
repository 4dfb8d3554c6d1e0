// Kernels that show what tests/kernels/host_cuda does; test_host_cuda.py calls them.
#include <stdexcept>
#include <string>

#include "common.cuh"
#include "tensor_cores.cuh"

namespace {

using namespace mk::cuda;

// out[i] = n - 1 - i by way of shared memory; right only with the barrier.
template <bool kBarrier>
__global__ void reversed_kernel(int* out) {
  __shared__ int values[256];
  int* more = dynamic_shared<int>();
  values[threadIdx.x] = more[threadIdx.x] = int(threadIdx.x);
  if (kBarrier) __syncthreads();
  const int from = blockDim.x - 1 - threadIdx.x;
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[from] == more[from] ? values[from] : -1;
}

// out[i] = the sum of once, twice and three times all thread numbers, one sum after another by way
// of the same shared memory.
template <bool kBarrier>
__global__ void sums_kernel(int* out) {
  __shared__ int sums[8];
  int total = 0;
  for (int round = 0; round < 3; ++round) {
    const int sum = __reduce_add_sync(~0u, int(threadIdx.x) * (round + 1));
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    for (int w = 0; w < 8; ++w) total += sums[w];
    if (kBarrier) __syncthreads();
  }
  out[threadIdx.x] = total;
}

__global__ void uninitialised_kernel(int* out) {
  __shared__ int values[256];
  int* more = dynamic_shared<int>();
  out[blockIdx.x * 2] = values[17];
  out[blockIdx.x * 2 + 1] = more[17];
  values[17] = more[17] = 0;
}

// Blocks and threads sign in as they come.
__global__ void arrival_kernel(int* out) {
  out[1 + atomicAdd(out, 1)] = int(blockIdx.x * blockDim.x + threadIdx.x);
}

__global__ void warp_kernel(int* out) {
  const int i = int(threadIdx.x), lane = i % 32, value = 3 * i + 1;
  int* mine = out + 10 * i;
  mine[0] = __shfl_sync(~0u, value, lane * 7);
  mine[1] = __shfl_up_sync(~0u, value, 3);
  mine[2] = __shfl_down_sync(~0u, value, 3, 16);
  mine[3] = int(__shfl_xor_sync(~0u, double(value), 5));
  mine[4] = int(__ballot_sync(~0u, i % 3 == 0));
  mine[5] = __reduce_add_sync(~0u, value);
  mine[6] = int(__match_any_sync(~0u, i % 5));
  mine[7] = __any_sync(~0u, i == 40) * 2 + __all_sync(~0u, i < 32);
  mine[8] = 0;
  if (lane < 8) mine[8] = int(__reduce_max_sync(0xffu, unsigned(value)));  // some lanes only
  mine[9] = __syncthreads_count(i % 3 == 0);
}

__global__ void early_end_kernel(int* out) {
  if (threadIdx.x >= 100) return;
  __syncthreads();
  *out = 1;
}

__global__ void two_places_kernel(int* out) {
  if (threadIdx.x < 100)
    __syncthreads();
  else
    __syncthreads();
  *out = 1;
}

__global__ void too_far_kernel(int*) { dynamic_shared<int>()[threadIdx.x] = 0; }

__global__ void missing_lane_kernel(int* out) {
  if (threadIdx.x != 5) *out = __shfl_sync(~0u, 1, 0);
}

__global__ void bits_kernel(int* out, const double* x, int n) {
  for (int i = 0; i < n; ++i) out[i] = __float_as_int(__double2float_rz(x[i]));
}

// out[i] = in[4 (n - 1 - i)] by way of copies of 16 bytes; right only with the wait and the
// barrier.
template <bool kWait, bool kBarrier>
__global__ void copied_kernel(int* out, const int* in) {
  int* shared = dynamic_shared<int>();
  const int i = int(threadIdx.x), from = 4 * int(blockDim.x - 1 - threadIdx.x);
  copy_async(shared + 4 * i, in + 4 * i, true);
  copy_commit();
  copy_async(shared + 4 * (int(blockDim.x) + i), in, false);
  copy_commit();
  copy_wait<kWait ? 1 : 2>();
  if (kBarrier) __syncthreads();
  out[i] = shared[from];
  copy_wait<0>();
  if (kBarrier) __syncthreads();
  out[blockDim.x + i] = shared[4 * int(blockDim.x) + from];
}

__global__ void forgotten_kernel(int*, const int* in) {
  copy_async(dynamic_shared<int>(), in, true);
  copy_commit();
}

// c += x^T y for x of 16 x 16 and y of 16 x 8 elements, row by row.
template <class T>
__global__ void products_kernel(float* c, const std::uint16_t* x, const std::uint16_t* y) {
  std::uint16_t* shared = dynamic_shared<std::uint16_t>();
  const int lane = int(threadIdx.x);
  copy_async(shared + lane * 8, x + lane * 8, true);
  copy_async(shared + 256 + lane * 8, y + lane * 8, lane < 16);
  copy_commit();
  copy_wait<0>();
  __syncwarp();
  std::uint32_t a[4], b[4];
  load_transposed(a, shared + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
  load_transposed(b, shared + 256 + lane % 16 * 8);
  float* of = c + lane / 4 * 8 + lane % 4 * 2;
  float sums[4] = {of[0], of[1], of[64], of[65]};
  multiply_add<T>(sums, a, b[0], b[1]);
  of[0] = sums[0], of[1] = sums[1], of[64] = sums[2], of[65] = sums[3];
}

template <class... P, class... A>
const char* report(void (*kernel)(P...), int blocks, int threads, int shared, A... args) {
  static thread_local std::string said;  // not in .bss, which is shared memory
  said.clear();
  try {
    launch(kernel, blocks, threads, shared, nullptr, args...);
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  return said.c_str();
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

EXPORT reversed(int* out) { return report(reversed_kernel<true>, 3, 256, 1024, out); }
EXPORT reversed_without_barrier(int* out) {
  return report(reversed_kernel<false>, 3, 256, 1024, out);
}
EXPORT sums(int* out) { return report(sums_kernel<true>, 1, 256, 0, out); }
EXPORT sums_without_barrier(int* out) { return report(sums_kernel<false>, 1, 256, 0, out); }
EXPORT uninitialised(int* out) { return report(uninitialised_kernel, 3, 1, 1024, out); }
EXPORT arrival(int* out) { return report(arrival_kernel, 7, 64, 0, out); }
EXPORT warps(int* out) { return report(warp_kernel, 1, 64, 0, out); }
EXPORT early_end(int* out) { return report(early_end_kernel, 1, 128, 0, out); }
EXPORT two_places(int* out) { return report(two_places_kernel, 1, 128, 0, out); }
EXPORT too_far(int* out) { return report(too_far_kernel, 1, 32, 31 * 4, out); }
EXPORT missing_lane(int* out) { return report(missing_lane_kernel, 1, 32, 0, out); }
EXPORT double2float_rz(int* out, const double* x, int n) {
  return report(bits_kernel, 1, 1, 0, out, x, n);
}
EXPORT copied(int* out, const int* in) {
  return report(copied_kernel<true, true>, 1, 128, 4096, out, in);
}
EXPORT copied_without_wait(int* out, const int* in) {
  return report(copied_kernel<false, true>, 1, 128, 4096, out, in);
}
EXPORT copied_without_barrier(int* out, const int* in) {
  return report(copied_kernel<true, false>, 1, 128, 4096, out, in);
}
EXPORT forgotten(int* out, const int* in) { return report(forgotten_kernel, 2, 3, 16, out, in); }
EXPORT products_bfloat16(float* c, const std::uint16_t* x, const std::uint16_t* y) {
  return report(products_kernel<mk::bf16>, 1, 32, 1024, c, x, y);
}
EXPORT products_float16(float* c, const std::uint16_t* x, const std::uint16_t* y) {
  return report(products_kernel<mk::f16>, 1, 32, 1024, c, x, y);
}
