#include "sums.cuh"
#include "weighted_sum.cuh"

namespace mk::cuda {
namespace {

// The weight of every element.
template <class A>
struct OfAll {
  const A* __restrict__ weights;
  A now;
  __device__ void enter(std::int64_t i) { now = weights[i]; }
  __device__ A of(int) const { return now; }
};

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
  const std::int64_t thread = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t threads = std::int64_t(gridDim.x) * kThreads;

#pragma unroll 1
  for (std::int64_t at = thread; at < packs; at += threads) {
    A sum[N];
    sum_pack(xs, n, at * N, sum, OfAll<A>{weights, A(0)});
    Pack<Out, N> y;
#pragma unroll
    for (int k = 0; k < N; ++k) store(kDivide ? div(sum[k], divisor) : sum[k], &y.v[k]);
    y.write(out + at * N);
  }

#pragma unroll 1
  for (std::int64_t at = packs * N + thread; at < numel; at += threads) {
    const A sum = sum_one<In, A>(xs, n, at, OfAll<A>{weights, A(0)});
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
