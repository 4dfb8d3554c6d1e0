#include "gram.cuh"

#include "block_sum.cuh"

namespace mk::cuda {
namespace {

// Elements that a thread takes of each of N matrices at a time: 64 bytes are on their way.
template <class T, int N>
constexpr int kTaken = 64 / N / sizeof(T);

// Elements [at, at + K) of a row of a matrix, zeros from `end` on.
template <int K, class T>
__device__ inline Pack<T, K> taken(const T* row, const GramMatrix& matrix, std::int64_t at,
                                   std::int64_t end, bool wide) {
  Pack<T, K> x;
  if (wide && end - at >= K) {
    x.read(row + at);
  } else {
#pragma unroll
    for (int e = 0; e < K; ++e)
      x.v[e] = at + e < end ? row[(at + e) * matrix.column] : T{};
  }
  return x;
}

// N vectors among themselves, or N with N others.
template <class T, int N, bool kCross>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    dots_kernel(const GramDots args) {
  constexpr int K = kTaken<T, N>;
  constexpr int kVectors = kCross ? 2 * N : N, kSums = kCross ? N * N : N * (N + 1) / 2;
  const std::int64_t set = blockIdx.x % args.sets, block = blockIdx.x / args.sets;
  const std::int64_t thread = block * kThreads + threadIdx.x, team = thread / args.lanes;
  // Neighbouring teams take neighbouring rows, which may lie side by side.
  const std::int64_t chunk = team / args.rows, row = team - chunk * args.rows;
  const bool there = chunk < args.chunks;  // beyond, beside others of a warp, there is no element
  const int lane = int(thread % args.lanes);
  const std::int64_t begin = chunk * args.chunk, past = begin + args.chunk;
  const std::int64_t end = past < args.width ? past : args.width;

  const auto matrix = [&](int v) -> const GramMatrix& {
    const std::int64_t i = args.firsts[(v / N) * args.sets + set] + v % N;
    return args.matrices[i < args.n ? i : args.n - 1];
  };
  const auto of = [row](const GramMatrix& m) {
    return global(reinterpret_cast<const T*>(m.address)) + row * m.row;
  };
  const GramMatrix& base = args.matrices[args.based ? args.n : 0];
  const T* rows[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) rows[v] = of(matrix(v));
  const T* const zeros = of(base);

  double sums[kSums] = {};
#pragma unroll 1
  for (std::int64_t at = begin + lane * K; at < end; at += args.lanes * K) {
    Pack<T, K> x[kVectors], zero;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) x[v] = taken<K>(rows[v], matrix(v), at, end, args.wide);
    if (args.based) zero = taken<K>(zeros, base, at, end, args.wide);
#pragma unroll
    for (int e = 0; e < K; ++e) {
      double d[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        d[v] = double(load(x[v].v[e]));
        if (args.based) d[v] -= double(load(zero.v[e]));
      }
      int s = 0;
#pragma unroll
      for (int i = 0; i < N; ++i)
#pragma unroll
        for (int j = kCross ? N : i; j < kVectors; ++j, ++s)
          sums[s] = __fma_rn(d[i], d[j], sums[s]);
    }
  }

  double* to = args.partial + (set * kSums * args.chunks + chunk) * args.rows + row;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    const double sum = lane_sum(sums[s], args.lanes);
    if (there && lane == 0) to[s * args.rows * args.chunks] = sum;
  }
}

// The chunks of each row in order.
template <bool kBlock>
__global__ void __launch_bounds__(kSummed) sums_kernel(const GramSums args) {
  const std::int64_t thread = std::int64_t(blockIdx.x) * kSummed + threadIdx.x;
  const std::int64_t team = thread / args.lanes;
  const std::int64_t which = team / args.rows, row = team - which * args.rows;
  const bool there = which < args.count;
  const std::int64_t* pair = args.pairs + (there ? which : 0) * 3;
  const int lane = int(thread % args.lanes);
  const double* of = args.partial + pair[2] * args.chunks * args.rows + row;
  double sum = 0;
#pragma unroll 8
  for (std::int64_t c = lane; c < (there ? args.chunks : 0); c += args.lanes) sum += of[c * args.rows];
  sum = kBlock ? block_sum(sum) : lane_sum(sum, args.lanes);
  if (!there || lane != 0) return;
  double* to = args.out + row * args.n * args.n;
  to[pair[0] * args.n + pair[1]] = sum;
  to[pair[1] * args.n + pair[0]] = sum;
}

}  // namespace

cudaError_t gram_dots(const GramDots& args, int device, cudaStream_t stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  with_type(args.dtype, [&](auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    const auto kernel = args.set == GramSet::two    ? dots_kernel<T, 2, false>
                        : args.set == GramSet::four ? dots_kernel<T, 4, false>
                                                    : dots_kernel<T, 4, true>;
    const unsigned blocks = blocks_for(args.rows * args.chunks * args.lanes);
    launch(kernel, unsigned(blocks * args.sets), kThreads, 0, stream, args);
  });
  return cudaGetLastError();
}

cudaError_t gram_sums(const GramSums& args, int device, cudaStream_t stream) {
  static_assert(kSummed == kThreads, "block_sum takes kThreads");
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const bool block = args.lanes == kSummed;
  launch(block ? sums_kernel<true> : sums_kernel<false>,
         blocks_for(args.count * args.rows * args.lanes), kSummed,
         block ? kWarps * sizeof(double) : 0, stream, args);
  return cudaGetLastError();
}

}  // namespace mk::cuda
