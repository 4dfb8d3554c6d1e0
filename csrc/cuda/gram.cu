#include "block_sum.cuh"
#include "gram.cuh"

namespace mk::cuda {
namespace {

// Elements that a thread takes of each matrix at a time: 16 bytes.
template <class T>
constexpr int kTaken = 16 / sizeof(T);

// Blocks that a multiprocessor has registers for.
template <int N, bool kCross, bool kBased>
constexpr int kBlocks = kCross ? 1 : (N == 2 ? 4 : 2) - kBased;

// N vectors among themselves, or N with N others. kWide: packs are contiguous and aligned.
template <class T, int N, bool kCross, bool kWide, bool kBased>
__global__ void __launch_bounds__(kThreads, kBlocks<N, kCross, kBased>)
    dots_kernel(const GramDots args) {
  constexpr int K = kTaken<T>;
  constexpr int kVectors = kCross ? 2 * N : N, kSums = kCross ? N * N : N * (N + 1) / 2;
  const std::int64_t set = blockIdx.x % args.sets, block = blockIdx.x / args.sets;
  const std::int64_t thread = block * kThreads + threadIdx.x, team = thread / args.lanes;
  // Neighbouring teams take neighbouring rows, which may lie side by side.
  const std::int64_t chunk = team / args.rows, row = team - chunk * args.rows;
  const bool there = chunk < args.chunks;  // beyond, beside others of a warp, there is no element
  const int lane = int(thread % args.lanes);
  const std::int64_t begin = chunk * args.chunk, rest = args.width - begin;
  const int end = int(rest < args.chunk ? rest : args.chunk);  // of the chunk

  const auto matrix = [&](int v) -> const GramMatrix& {
    const std::int64_t i = args.firsts[(v / N) * args.sets + set] + v % N;
    return args.matrices[i < args.n ? i : args.n - 1];
  };
  const auto of = [row, begin](const GramMatrix& m) {
    return global(reinterpret_cast<const T*>(m.address)) + row * m.row + begin * m.column;
  };
  const GramMatrix& base = args.matrices[kBased ? args.n : 0];
  const T* rows[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) rows[v] = of(matrix(v));
  const T* const zeros = of(base);
  double* const to = args.partial + (set * kSums * args.chunks + chunk) * args.rows + row;

  double sums[kSums] = {};
  const auto join = [&sums](const T(&x)[kVectors], T zero) {
    double d[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      d[v] = double(load(x[v]));
      if (kBased) d[v] -= double(load(zero));
    }
    int s = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int j = kCross ? N : i; j < kVectors; ++j, ++s) sums[s] = __fma_rn(d[i], d[j], sums[s]);
  };
#pragma unroll 1
  for (int at = lane * K; at < end; at += args.lanes * K) {
    if (kWide && end - at >= K) {
      Pack<T, K> x[kVectors], zero;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) x[v].read(rows[v] + at);
      if (kBased) zero.read(zeros + at);
#pragma unroll
      for (int e = 0; e < K; ++e) {
        T each[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) each[v] = x[v].v[e];
        join(each, zero.v[e]);
      }
      continue;
    }
    const int stop = at + K < end ? at + K : end;  // the same order, one by one
#pragma unroll 1
    for (int e = at; e < stop; ++e) {
      T each[kVectors], zero{};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) each[v] = rows[v][kWide ? e : e * matrix(v).column];
      if (kBased) zero = zeros[kWide ? e : e * base.column];
      join(each, zero);
    }
  }

#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    const double sum = lane_sum(sums[s], args.lanes);
    if (there && lane == 0) to[s * args.rows * args.chunks] = sum;
  }
}

template <class T, bool kWide, bool kBased>
auto dots_of(GramSet set) {
  return set == GramSet::two    ? dots_kernel<T, 2, false, kWide, kBased>
         : set == GramSet::four ? dots_kernel<T, 4, false, kWide, kBased>
                                : dots_kernel<T, 4, true, kWide, kBased>;
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
  for (std::int64_t c = lane; c < (there ? args.chunks : 0); c += args.lanes)
    sum += of[c * args.rows];
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
    const auto kernel = args.wide    ? args.based ? dots_of<T, true, true>(args.set)
                                                  : dots_of<T, true, false>(args.set)
                        : args.based ? dots_of<T, false, true>(args.set)
                                     : dots_of<T, false, false>(args.set);
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
