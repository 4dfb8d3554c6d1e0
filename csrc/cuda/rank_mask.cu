#include "keys.cuh"
#include "rank_mask.cuh"

namespace mk::cuda {
namespace {

// Where elements are; divisions by what is known before the launch.
struct Places {
  Divisor unit, inner;

  __device__ std::int64_t row(std::int64_t e) const {
    return unit.quotient(e) * inner.by + inner.remainder(e);
  }
  __device__ std::int64_t in_row(std::int64_t e) const { return inner.quotient(unit.remainder(e)); }
  // Of the row of e.
  __device__ std::int64_t first(std::int64_t e) const {
    return unit.quotient(e) * unit.by + inner.remainder(e);
  }
};

template <class K>
__device__ inline std::int64_t bin_of(const RowBins& args, std::int64_t row, K key) {
  const std::int64_t* of = args.rows + 5 * row;
  const std::int64_t value = std::int64_t(key), floor = of[1];
  return value < floor ? (value - of[0]) >> of[3] : ((value - floor) >> of[4]) + args.half;
}

template <class K>
__global__ void __launch_bounds__(kThreads)
    bin_kernel(const RowBins args, const Places places, int* counts) {
  const std::int64_t e = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= args.numel) return;
  const std::int64_t row = places.row(e);
  const K key = static_cast<const K*>(args.keys)[e];
  atomicAdd(counts + row * 2 * args.half + bin_of(args, row, key), 1);
}

// The draws of elements from `first` on.
__device__ inline void draws_from(const RankMask& args, std::int64_t first,
                                  unsigned (&draws)[kEight]) {
  std::uint32_t words[8];
  std::uint32_t (&here)[4] = *reinterpret_cast<std::uint32_t (*)[4]>(words);
  std::uint32_t (&next)[4] = *reinterpret_cast<std::uint32_t (*)[4]>(words + 4);
  draw_eight(args.k0, args.k1, std::uint64_t(first) / kEight, here);
  const int in = int(first % kEight);
  if (in) {
    draw_eight(args.k0, args.k1, std::uint64_t(first) / kEight + 1, next);
#pragma unroll 1
    for (int i = 0; i < in; ++i) {
#pragma unroll
      for (int w = 0; w < 7; ++w) words[w] = words[w] >> 16 | words[w + 1] << 16;
      words[7] >>= 16;
    }
  }
#pragma unroll
  for (int j = 0; j < kEight; ++j) draws[j] = words[j / 2] >> (j % 2 * 16) & 0xffffu;
}

// The rank of element p within its row, by the lanes of a warp.
template <class K>
__device__ inline int rank_of(const RowBins& args, std::int64_t first, std::int64_t p, K key) {
  const K* keys = static_cast<const K*>(args.keys);
  int before = 0;
#pragma unroll 4
  for (std::int64_t j = threadIdx.x % 32; j < args.length; j += 32) {
    const std::int64_t e = first + j * args.inner;
    before += keys[e] < key || (keys[e] == key && e < p);
  }
  return __reduce_add_sync(~0u, before);
}

template <class K>
struct Chosen {  // eight elements, a bit for each with the first in the lowest
  K keys[kEight];
  unsigned draws[kEight];
  unsigned kept, undecided;
};

// A draw needs the rank of its element only where a limit lies between the limits of the first and
// the last rank of its bin.
template <class K>
__device__ inline void decide_by_bins(const RankMask& args, const Places& places, std::int64_t at,
                                      Chosen<K>& x) {
  const RowBins& bins = args.bins;
  x.kept = x.undecided = 0;
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    x.keys[j] = 0;
    if (at + j >= bins.numel) continue;
    x.keys[j] = static_cast<const K*>(bins.keys)[at + j];
    const std::int64_t row = places.row(at + j), bin = bin_of(bins, row, x.keys[j]);
    const int* ends = args.ends + row * 2 * bins.half + bin;
    std::int64_t start = bin > 0 ? ends[-1] : 0, last = ends[0] - 1;
    if (bins.rows[5 * row] == bins.rows[5 * row + 2])  // ranks of equal keys are their indices
      start = last = places.in_row(at + j);
    const bool kept = int(x.draws[j]) < args.limits[start];
    x.kept |= unsigned(kept) << j;
    x.undecided |= unsigned(!kept && int(x.draws[j]) < args.limits[last]) << j;
  }
}

// One element after another by a whole warp, and with it those of equal keys that follow it here.
template <class K>
__device__ inline void decide_by_ranks(const RankMask& args, const Places& places, std::int64_t at,
                                       Chosen<K>& x) {
  while (const unsigned lanes = __ballot_sync(~0u, x.undecided != 0)) {
    const int leader = __ffs(int(lanes)) - 1;
    const int mine = x.undecided ? __ffs(int(x.undecided)) - 1 : 0;
    K key = 0;
#pragma unroll
    for (int j = 0; j < kEight; ++j) key = j == mine ? x.keys[j] : key;
    key = __shfl_sync(~0u, key, leader);
    const std::int64_t p = __shfl_sync(~0u, at + mine, leader), first = places.first(p);
    const int rank = rank_of(args.bins, first, p, key);
    const std::int64_t row = places.row(p);
    unsigned same = 0;
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const std::int64_t e = at + j;
      if (e >= p && e < args.bins.numel && x.keys[j] == key && places.row(e) == row)
        same |= 1u << j;
    }
    int next = rank + scan_warp(__popc(same)) - __popc(same);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      if (!(same >> j & 1u)) continue;
      x.kept &= ~(1u << j);
      x.kept |= unsigned(int(x.draws[j]) < args.limits[next++]) << j;
    }
    x.undecided &= ~same;
  }
}

__device__ inline double magnitude_of(std::uint32_t key) { return __uint_as_float(key); }
__device__ inline double magnitude_of(std::uint64_t key) {
  return __longlong_as_double((long long)(key));
}

template <class K>
__global__ void __launch_bounds__(kThreads, 1)
    rank_mask_kernel(const RankMask args, const Places places) {
  const std::int64_t at = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) * kEight;
  Chosen<K> x;
  draws_from(args, args.first + at, x.draws);
  decide_by_bins(args, places, at, x);
  decide_by_ranks(args, places, at, x);
  if (at < args.bins.numel) args.bits[at / kEight] = std::uint8_t(__brev(x.kept) >> 24);
  double everything = 0, kept = 0;
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    const double size = magnitude_of(x.keys[j]);
    everything = add(everything, size);
    if (x.kept >> j & 1u) kept = add(kept, size);
  }
  everything = block_sum(everything);
  kept = block_sum(kept);
  if (threadIdx.x == 0)
    args.sums[2 * blockIdx.x] = everything, args.sums[2 * blockIdx.x + 1] = kept;
}

Places places_of(const RowBins& args) {
  return {Divisor(args.length * args.inner), Divisor(args.inner)};
}

}  // namespace

cudaError_t count_bins(const RowBins& args, int* counts, int device, cudaStream_t stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  launch(args.wide ? bin_kernel<std::uint64_t> : bin_kernel<std::uint32_t>, blocks_for(args.numel),
         kThreads, 0, stream, args, places_of(args), counts);
  return cudaGetLastError();
}

cudaError_t rank_mask(const RankMask& args, int device, cudaStream_t stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const std::int64_t tiles = (args.bins.numel + kRankTile - 1) / kRankTile;
  launch(args.bins.wide ? rank_mask_kernel<std::uint64_t> : rank_mask_kernel<std::uint32_t>,
         unsigned(tiles), kThreads, kWarps * sizeof(double), stream, args, places_of(args.bins));
  return cudaGetLastError();
}

}  // namespace mk::cuda
