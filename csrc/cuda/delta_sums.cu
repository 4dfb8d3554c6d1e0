#include "deltas.cuh"

namespace mk::cuda {
namespace {

template <class T, bool kRounded>
__global__ void __launch_bounds__(kThreads) l1_norms_kernel(const DeltaTable args, double* sums) {
  const std::int64_t at = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) * kEight;
  const std::int64_t numel = args.numel;
  Eight<T> base;
  if (args.base) base = read_eight<T>(args.base, at, numel, args.wide);
#pragma unroll 1
  for (std::int64_t i = 0; i < args.n; ++i) {
    const DeltaRule& rule = args.rules[i];
    acc_t<T> d[kEight];
    difference<T, kRounded>(read_eight<T>(rule.x, at, numel, args.wide), base, args.base, d);
    const std::uint32_t kept = kept_eight(rule, d, at, numel);
    double everything = 0, survivors = 0;
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const double size = fabs(double(d[j]));
      everything += size;
      survivors += bit_of(kept, j) ? size : 0;
    }
    everything = block_sum(everything);
    survivors = block_sum(survivors);
    if (threadIdx.x == 0) {
      double* of = sums + (blockIdx.x * args.n + i) * 2;
      of[0] = everything, of[1] = survivors;
    }
  }
}

template <class T, bool kRounded>
__global__ void __launch_bounds__(kThreads)
    count_kept_kernel(const DeltaTable args, std::int64_t first, std::int64_t last, int* counts) {
  const std::int64_t tile = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t at = (first / kEight + tile) * kEight, numel = args.numel;
  Eight<T> base;
  if (args.base) base = read_eight<T>(args.base, at, numel, args.wide);
  std::uint32_t inside = 0, positive = 0, negative = 0;
#pragma unroll
  for (int j = 0; j < kEight; ++j) inside = inside << 1 | (at + j >= first && at + j < last);
  int* of = counts + blockIdx.x * (args.n + 1);
#pragma unroll 1
  for (std::int64_t i = 0; i < args.n; ++i) {
    const DeltaRule& rule = args.rules[i];
    acc_t<T> d[kEight];
    difference<T, kRounded>(read_eight<T>(rule.x, at, numel, args.wide), base, args.base, d);
    const std::uint32_t kept = kept_eight(rule, d, at, numel) & inside;
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      positive |= kept & std::uint32_t(d[j] > 0) << (kEight - 1 - j);
      negative |= kept & std::uint32_t(d[j] < 0) << (kEight - 1 - j);
    }
    const int total = block_sum(__popc(kept));
    if (threadIdx.x == 0) of[i] = total;
  }
  const int conflicts = block_sum(__popc(positive & negative));
  if (threadIdx.x == 0) of[args.n] = conflicts;
}

unsigned tiles_of(std::int64_t elements) {
  return unsigned((elements + kDeltaTile - 1) / kDeltaTile);
}

}  // namespace

cudaError_t l1_norms(const DeltaTable& args, double* sums, int device, cudaStream_t stream) {
  if (args.numel == 0) return cudaSuccess;
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  with_type(args.dtype, [&](auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    launch(args.rounded ? l1_norms_kernel<T, true> : l1_norms_kernel<T, false>,
           tiles_of(args.numel), kThreads, kWarps * sizeof(double), stream, args, sums);
  });
  return cudaGetLastError();
}

cudaError_t count_kept(const DeltaTable& args, std::int64_t first, std::int64_t last, int* counts,
                       int device, cudaStream_t stream) {
  if (first >= last) return cudaSuccess;
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  with_type(args.dtype, [&](auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    launch(args.rounded ? count_kept_kernel<T, true> : count_kept_kernel<T, false>,
           tiles_of(last - first / kEight * kEight), kThreads, kWarps * sizeof(int), stream, args,
           first, last, counts);
  });
  return cudaGetLastError();
}

}  // namespace mk::cuda
