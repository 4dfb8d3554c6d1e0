#include "sums.cuh"
#include "weighted_rows.cuh"

namespace mk::cuda {
namespace {

// The weight of N elements of one row.
template <class A>
struct OfRow {
  const A* weights;
  std::int64_t k;
  A now;
  __device__ OfRow(const A* weights, Divisor k, Divisor inner, std::int64_t at)
      : weights(weights + k.remainder(inner.quotient(at))), k(k.by) {}
  __device__ void enter(std::int64_t i) { now = weights[i * k]; }
  __device__ A of(int) const { return now; }
};

// The weights of N elements that lie anywhere: the row of each follows from that before it.
template <class A, int N>
struct OfEach {
  const A* weights;
  const A* now;
  std::int64_t k;
  std::int64_t row[N];
  __device__ OfEach(const A* weights, Divisor k, Divisor inner, std::int64_t at)
      : weights(weights), k(k.by) {
    const std::int64_t rows = inner.quotient(at);
    std::int64_t within = at - rows * inner.by, r = k.remainder(rows);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      row[j] = r;
      if (++within < inner.by) continue;
      within = 0;
      r = r + 1 < k.by ? r + 1 : 0;
    }
  }
  __device__ void enter(std::int64_t i) { now = weights + i * k; }
  __device__ A of(int j) const { return now[row[j]]; }
};

// As weighted_sum_kernel. kRows: the elements of a pack lie in one row.
template <class In, class Out, bool kRows>
__global__ void __launch_bounds__(kThreads)
    weighted_rows_kernel(Out* out, const In* const* __restrict__ xs,
                         const sum_t<In>* __restrict__ weights, std::int64_t n, std::int64_t packs,
                         std::int64_t numel, Divisor k, Divisor inner) {
  using A = sum_t<In>;
  constexpr int N = kPack<In, Out>;
  using Factor = std::conditional_t<kRows, OfRow<A>, OfEach<A, N>>;
  const std::int64_t thread = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t threads = std::int64_t(gridDim.x) * kThreads;

#pragma unroll 1
  for (std::int64_t at = thread * N; at < packs * N; at += threads * N) {
    A sum[N];
    sum_pack(xs, n, at, sum, Factor(weights, k, inner, at));
    Pack<Out, N> y;
#pragma unroll
    for (int j = 0; j < N; ++j) store(sum[j], &y.v[j]);
    y.write(out + at);
  }

#pragma unroll 1
  for (std::int64_t at = packs * N + thread; at < numel; at += threads)
    store(sum_one<In, A>(xs, n, at, OfEach<A, 1>(weights, k, inner, at)), &out[at]);
}

template <class In, class Out, bool kRows>
void enqueue(const WeightedRows& args, std::int64_t packs, cudaStream_t stream) {
  const std::int64_t rest = args.numel - packs * kPack<In, Out>;
  launch(weighted_rows_kernel<In, Out, kRows>, blocks_for(packs > rest ? packs : rest), kThreads, 0,
         stream, static_cast<Out*>(args.out), reinterpret_cast<const In* const*>(args.xs),
         static_cast<const sum_t<In>*>(args.weights), args.n, packs, args.numel, Divisor(args.k),
         Divisor(args.inner));
}

}  // namespace

cudaError_t weighted_rows(const WeightedRows& args, int device, cudaStream_t stream) {
  if (args.numel == 0) return cudaSuccess;
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  with_type(args.x_dtype, [&](auto* x) {
    with_type(args.out_dtype, [&](auto* out) {
      using In = std::remove_pointer_t<decltype(x)>;
      using Out = std::remove_pointer_t<decltype(out)>;
      constexpr int N = kPack<In, Out>;
      const std::int64_t packs = args.wide ? args.numel / N : 0;
      if (args.inner % N == 0)
        enqueue<In, Out, true>(args, packs, stream);
      else
        enqueue<In, Out, false>(args, packs, stream);
    });
  });
  return cudaGetLastError();
}

}  // namespace mk::cuda
