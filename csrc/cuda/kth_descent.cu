#include "keys.cuh"

namespace mk::cuda {
namespace {

constexpr int kBins = 256;
static_assert(kBins == kThreads, "a thread has a bin");

// A warp looks through what one chunk kept.
struct Scratch {
  unsigned long long totals[kWarps];
  std::int64_t digit, larger, equal;
  int bins[kBins];
};

// Where a selection stands: bytes so far, rank among what they leave, and what they leave.
struct Standing {
  std::uint64_t prefix;
  std::int64_t left, equal;
};

// Before a round that is not the first. Every block takes the step by itself, which saves a launch.
__device__ inline Standing advance(const Brackets& brackets, const Descent& descent,
                                   std::int64_t bracket, int round, Scratch& scratch) {
  const std::int64_t last = (round - 1) * brackets.count + bracket;
  const std::int64_t left = descent.state[2 * last + 1];
  const int bin = kBins - 1 - int(threadIdx.x);
  const unsigned long long size = descent.histograms[last * kBins + bin];
  if (threadIdx.x == 0) scratch.digit = 0, scratch.larger = 0, scratch.equal = 0;
  const auto up_to_here = std::int64_t(scan_block(size, scratch.totals));
  const std::int64_t larger = up_to_here - std::int64_t(size);
  if (larger < left && left <= up_to_here)  // of one thread, or of none outside the bracket
    scratch.digit = bin, scratch.larger = larger, scratch.equal = std::int64_t(size);
  __syncthreads();
  const std::uint64_t prefix = std::uint64_t(descent.state[2 * last]) << 8 | scratch.digit;
  return {prefix, left - scratch.larger, scratch.equal};
}

// What chunk `slot` kept.
template <class K>
__device__ inline const K* kept_of(const Brackets& brackets, std::int64_t slot) {
  return static_cast<const K*>(brackets.kept) + slot * brackets.room;
}

template <class K>
__global__ void __launch_bounds__(kThreads)
    byte_kernel(const Brackets brackets, const Descent descent, int round) {
  Scratch& scratch = *dynamic_shared<Scratch>();
  const std::int64_t bracket = blockIdx.x % unsigned(brackets.count);
  const std::int64_t group = blockIdx.x / unsigned(brackets.count);
  const std::int64_t chunk = group * kWarps + threadIdx.x / 32;
  const std::int64_t here = round * brackets.count + bracket;
  const int shift = 8 * (int(sizeof(K)) - 1 - round), lane = threadIdx.x % 32;
  const K* edges = static_cast<const K*>(brackets.edges) + 2 * bracket;
  const K low = edges[0], span = edges[1] - low;
  std::uint64_t prefix = 0;
  scratch.bins[threadIdx.x] = 0;
  if (round > 0) {
    const Standing now = advance(brackets, descent, bracket, round, scratch);
    prefix = now.prefix;
    if (group == 0 && threadIdx.x == 0)
      descent.state[2 * here] = std::int64_t(prefix), descent.state[2 * here + 1] = now.left;
  }
  __syncthreads();
  if (chunk < brackets.chunks) {
    const std::int64_t slot = bracket * brackets.chunks + chunk;
    const int filled = min(brackets.counts[4 * slot + 2], int(brackets.room));
    const K* kept = kept_of<K>(brackets, slot);
    if (span >> shift == 0) {  // no distance has this byte
      if (lane == 0) atomicAdd(&scratch.bins[0], filled);
    } else {
      for (int i = lane; i < filled; i += 32) {
        const K distance = kept[i] - low;
        if (round == 0 || distance >> shift >> 8 == prefix)
          atomicAdd(&scratch.bins[distance >> shift & 0xffu], 1);
      }
    }
  }
  __syncthreads();
  const int size = scratch.bins[threadIdx.x];
  if (size) atomicAdd(descent.histograms + here * kBins + threadIdx.x, (unsigned long long)(size));
}

template <class K>
__global__ void __launch_bounds__(kThreads)
    tie_kernel(const Brackets brackets, const Descent descent, const std::int64_t* totals,
               const std::int64_t* wanted, std::int64_t* found, int* ties) {
  Scratch& scratch = *dynamic_shared<Scratch>();
  const std::int64_t bracket = blockIdx.x % unsigned(brackets.count);
  const std::int64_t group = blockIdx.x / unsigned(brackets.count);
  const std::int64_t chunk = group * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const K* edges = static_cast<const K*>(brackets.edges) + 2 * bracket;
  const std::int64_t k = wanted[bracket], above = totals[4 * bracket];
  const std::int64_t to_high = above + totals[4 * bracket + 1];
  const std::int64_t to_inside = to_high + totals[4 * bracket + 2];
  const std::int64_t to_low = to_inside + totals[4 * bracket + 3];
  const Standing now = advance(brackets, descent, bracket, int(sizeof(K)), scratch);
  const bool at_high = k <= to_high, inside = !at_high && k <= to_inside;
  const K key = inside ? edges[0] + K(now.prefix) : edges[at_high];
  if (chunk < brackets.chunks) {
    const std::int64_t slot = bracket * brackets.chunks + chunk;
    const int* counts = brackets.counts + 4 * slot;
    const int filled = min(counts[2], int(brackets.room));
    const K* kept = kept_of<K>(brackets, slot);
    int same = 0;
    if (inside)
      for (int i = lane; i < filled; i += 32) same += kept[i] == key;
    same = __reduce_add_sync(~0u, same);
    if (lane == 0) ties[slot] = inside ? same : counts[at_high ? 1 : 3];
  }
  if (group != 0 || threadIdx.x != 0) return;
  std::int64_t* row = found + 6 * bracket;
  row[0] = std::int64_t(key);
  row[1] = inside ? k - now.left : at_high ? above : to_inside;
  row[2] = inside ? now.equal : at_high ? to_high - above : to_low - to_inside;
  row[4] = k;
  row[5] = k > above && k <= to_low;
}

unsigned blocks_of(const Brackets& brackets) {
  return unsigned(brackets.count * ((brackets.chunks + kWarps - 1) / kWarps));
}

}  // namespace

cudaError_t count_bytes(const Brackets& brackets, const Descent& descent, int round, int device,
                        cudaStream_t stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  launch(descent.wide ? byte_kernel<std::uint64_t> : byte_kernel<std::uint32_t>,
         blocks_of(brackets), kThreads, sizeof(Scratch), stream, brackets, descent, round);
  return cudaGetLastError();
}

cudaError_t count_ties(const Brackets& brackets, const Descent& descent, const std::int64_t* totals,
                       const std::int64_t* wanted, std::int64_t* found, int* ties, int device,
                       cudaStream_t stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  launch(descent.wide ? tie_kernel<std::uint64_t> : tie_kernel<std::uint32_t>, blocks_of(brackets),
         kThreads, sizeof(Scratch), stream, brackets, descent, totals, wanted, found, ties);
  return cudaGetLastError();
}

}  // namespace mk::cuda
