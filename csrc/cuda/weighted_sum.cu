#include "common.cuh"
#include "weighted_sum.cuh"

namespace mk::cuda {
namespace {

// Each thread takes packs of kPack elements through all inputs, `packs` in total; the elements
// after them (the tail, or all of them where 16-byte access is not possible) go one by one.
// kDivide is a template argument to keep the division's subroutine out of the common kernel.
template <class In, class Out, bool kDivide>
__global__ void __launch_bounds__(kThreads)
    weighted_sum_kernel(Out* out, const In* const* __restrict__ xs,
                        const sum_t<In>* __restrict__ weights, std::int64_t n, std::int64_t packs,
                        std::int64_t numel, sum_t<In> divisor) {
  using A = sum_t<In>;
  constexpr int N = kPack<In, Out>;
  // Inputs a thread reads before it adds the first of them: 64 bytes in flight.
  constexpr int kBatch = 64 / (N * sizeof(In));
  const std::int64_t thread = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t threads = std::int64_t(gridDim.x) * kThreads;

#pragma unroll 1
  for (std::int64_t at = thread; at < packs; at += threads) {
    A sum[N];
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] = A(-0.0);  // plus any p is p, also for p = -0
    for (std::int64_t i = 0; i < n; i += kBatch) {
      Pack<In, N> x[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
        if (i + j < n) x[j].read(global(xs[i + j]) + at * N);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (i + j >= n) break;
        const A w = weights[i + j];
#pragma unroll
        for (int k = 0; k < N; ++k) sum[k] = add(sum[k], mul(A(load(x[j].v[k])), w));
      }
    }
    Pack<Out, N> y;
#pragma unroll
    for (int k = 0; k < N; ++k) store(kDivide ? div(sum[k], divisor) : sum[k], &y.v[k]);
    y.write(out + at * N);
  }

#pragma unroll 1
  for (std::int64_t at = packs * N + thread; at < numel; at += threads) {
    A sum = mul(A(load(global(xs[0])[at])), weights[0]);
#pragma unroll 4
    for (std::int64_t i = 1; i < n; ++i) {
      sum = add(sum, mul(A(load(global(xs[i])[at])), weights[i]));
    }
    store(kDivide ? div(sum, divisor) : sum, &out[at]);
  }
}

template <class In, class Out, bool kDivide>
void enqueue(const WeightedSum& args, cudaStream_t stream) {
  using A = sum_t<In>;
  constexpr int N = kPack<In, Out>;
  const std::int64_t packs = args.wide ? args.numel / N : 0;
  const std::int64_t rest = args.numel - packs * N;
  launch(weighted_sum_kernel<In, Out, kDivide>, blocks_for(packs > rest ? packs : rest), kThreads,
         0, stream, static_cast<Out*>(args.out), reinterpret_cast<const In* const*>(args.xs),
         static_cast<const A*>(args.weights), args.n, packs, args.numel, A(args.divisor));
}

}  // namespace

cudaError_t weighted_sum(const WeightedSum& args, int device, cudaStream_t stream) {
  if (args.numel == 0) return cudaSuccess;
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  with_type(args.x_dtype, [&](auto* x) {
    with_type(args.out_dtype, [&](auto* out) {
      using In = std::remove_pointer_t<decltype(x)>;
      using Out = std::remove_pointer_t<decltype(out)>;
      if (args.divisor == 1.0)
        enqueue<In, Out, false>(args, stream);
      else
        enqueue<In, Out, true>(args, stream);
    });
  });
  return cudaGetLastError();
}

}  // namespace mk::cuda
