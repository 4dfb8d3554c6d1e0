#include "block_sum.cuh"
#include "coefficient_gradients.cuh"

namespace mk::cuda {
namespace {

template <class T, class G>
__global__ void __launch_bounds__(kThreads) products_kernel(const CoefficientGradients args) {
  constexpr int K = kPack<T, G>;
  const std::int64_t sets = (args.n + kTogether - 1) / kTogether;
  const std::int64_t first = blockIdx.x % sets * kTogether, chunk = blockIdx.x / sets;
  const std::int64_t begin = chunk * args.chunk, rest = args.numel - begin;
  const int end = int(rest < args.chunk ? rest : args.chunk);  // of the chunk
  const auto of = [&args, begin](std::int64_t i) {
    return global(reinterpret_cast<const T*>(args.xs[i])) + begin;
  };
  const T* xs[kTogether];  // past the last one, the last one again
#pragma unroll
  for (int k = 0; k < kTogether; ++k) xs[k] = of(first + k < args.n ? first + k : args.n - 1);
  const T* const base = of(args.based ? args.n : 0);
  const G* const grad = global(static_cast<const G*>(args.grad)) + begin;

  double sums[kTogether] = {};
  const auto join = [&args, &sums](const T(&x)[kTogether], T zero, G g) {
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      double d = double(load(x[k]));
      if (args.based) d -= double(load(zero));
      sums[k] = __fma_rn(d, double(load(g)), sums[k]);
    }
  };
#pragma unroll 1
  for (int at = int(threadIdx.x) * K; at < end; at += kThreads * K) {
    if (args.wide && end - at >= K) {
      Pack<T, K> x[kTogether], zero{};
      Pack<G, K> g;
      g.read(grad + at);
      if (args.based) zero.read(base + at);
#pragma unroll
      for (int k = 0; k < kTogether; ++k) x[k].read(xs[k] + at);
#pragma unroll
      for (int e = 0; e < K; ++e) {
        T each[kTogether];
#pragma unroll
        for (int k = 0; k < kTogether; ++k) each[k] = x[k].v[e];
        join(each, zero.v[e], g.v[e]);
      }
      continue;
    }
    const int stop = at + K < end ? at + K : end;  // the same order, one by one
#pragma unroll 1
    for (int e = at; e < stop; ++e) {
      T each[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) each[k] = xs[k][e];
      join(each, base[e], grad[e]);
    }
  }

#pragma unroll
  for (int k = 0; k < kTogether; ++k) {
    const double sum = block_sum(sums[k]);
    if (threadIdx.x == 0 && first + k < args.n) args.partial[chunk * args.n + first + k] = sum;
  }
}

}  // namespace

cudaError_t coefficient_gradients(const CoefficientGradients& args, int device,
                                  cudaStream_t stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const std::int64_t sets = (args.n + kTogether - 1) / kTogether;
  with_type(args.dtype, [&](auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    const bool twice = args.grad_dtype == DType::f64;
    launch(twice ? products_kernel<T, double> : products_kernel<T, float>,
           unsigned(sets * args.chunks), kThreads, kWarps * sizeof(double), stream, args);
  });
  return cudaGetLastError();
}

}  // namespace mk::cuda
