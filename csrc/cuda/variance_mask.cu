#include "keys.cuh"
#include "variance_mask.cuh"

namespace mk::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) variance_mask_kernel(const VarianceMask args) {
  const KeyTable& source = args.source;
  const std::int64_t numel = source.numel;
  const std::int64_t at = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) * kEight;
  unsigned kept = present_eight(at, numel);
  if (args.bits) {
    eight_keys<T> keys;
    keys_eight<T, Kind::variance>(source, 0, at, source.wide, keys);
    const auto threshold = key_t<T>(args.threshold);
    unsigned octet = 0;
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      if (keys[j] < threshold + (at + j >= args.cut)) kept &= ~(1u << j);
      octet = octet << 1 | (kept >> j & 1u);
    }
    if (at < numel) args.bits[at / kEight] = std::uint8_t(octet);
  }
  Eight<T> base;
  if (source.base) base = read_eight<T>(source.base, at, numel, source.wide);
#pragma unroll 1
  for (std::int64_t i = 0; i < source.n; ++i) {
    acc_t<T> d[kEight];
    difference<T, false>(read_eight<T>(source.xs[i], at, numel, source.wide), base, source.base, d);
    double sum = 0;
#pragma unroll
    for (int j = 0; j < kEight; ++j)
      if (kept >> j & 1u) sum = add(sum, mul(double(d[j]), double(d[j])));
    sum = block_sum(sum);
    if (threadIdx.x == 0) args.squares[blockIdx.x * source.n + i] = sum;
  }
}

}  // namespace

cudaError_t variance_mask(const VarianceMask& args, int device, cudaStream_t stream) {
  const std::int64_t tiles = (args.source.numel + kVarianceTile - 1) / kVarianceTile;
  if (tiles == 0) return cudaSuccess;
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  with_type(args.source.dtype, [&](auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    launch(variance_mask_kernel<T>, unsigned(tiles), kThreads, kWarps * sizeof(double), stream,
           args);
  });
  return cudaGetLastError();
}

}  // namespace mk::cuda
