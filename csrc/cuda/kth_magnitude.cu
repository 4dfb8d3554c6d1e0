#include "keys.cuh"

namespace mk::cuda {
namespace {

constexpr int kFinders = 512;  // threads that look through one chunk: few blocks do

// Eights of several vectors, side by side: they share the base.
template <class T, Kind kKind>
__global__ void __launch_bounds__(kThreads)
    keys_kernel(const KeyTable args, unsigned vectors, key_t<T>* out) {
  const std::int64_t vector = blockIdx.x % vectors;
  const std::int64_t tile = std::int64_t(blockIdx.x / vectors) * kThreads + threadIdx.x;
  const std::int64_t at = tile * kEight, numel = args.numel;
  eight_keys<T> keys;
  keys_eight<T, kKind>(args, vector, at, args.wide, keys);
#pragma unroll
  for (int j = 0; j < kEight; ++j)
    if (at + j < numel) out[vector * numel + at + j] = keys[j];
}

// A thread takes half a run.
template <class T, Kind kKind>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const KeyTable args, unsigned vectors, std::int64_t runs, key_t<T>* out) {
  const std::int64_t vector = blockIdx.x % vectors;
  const std::int64_t i = (std::int64_t(blockIdx.x / vectors) * kThreads + threadIdx.x) * kEight;
  const std::int64_t run = i / kSampleRun;
  if (run >= runs) return;
  const std::int64_t place = (run * 2654435761 >> 7) % (args.numel / runs - kSampleRun + 1);
  const std::int64_t at = run * args.numel / runs + place + i % kSampleRun;
  eight_keys<T> keys;
  keys_eight<T, kKind>(args, vector, at, false, keys);
#pragma unroll
  for (int j = 0; j < kEight; ++j) out[vector * runs * kSampleRun + i + j] = keys[j];
}

// Of 16-bit differences five blocks run on a multiprocessor, with 40 KB on their way; others have
// more of them in each thread, and take the registers that they need.
template <class T, Kind kKind>
constexpr int kBlocks = sizeof(T) == 2 && kKind != Kind::variance ? 5 : 1;

// A warp takes a chunk, so nothing waits for other warps; brackets of a chunk lie side by side, and
// what they share of it comes from memory once.
template <class T, Kind kKind>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kKind>)
    count_kernel(const KeyTable args, const Brackets brackets) {
  using K = key_t<T>;
  const unsigned warp = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned count = unsigned(brackets.count);
  if (warp >= count * unsigned(brackets.chunks)) return;
  const unsigned bracket = warp % count;
  const std::int64_t chunk = warp / count, slot = bracket * brackets.chunks + chunk;
  const K* edges = static_cast<const K*>(brackets.edges) + 2 * bracket;
  const K low = edges[0], high = edges[1];
  const std::int64_t vector = brackets.of[bracket], numel = args.numel;
  const int room = brackets.kept ? int(brackets.room) : 0;
  K* kept = global(static_cast<K*>(brackets.kept) + slot * room);
  int above = 0, at_high = 0, at_low = 0, filled = 0;
  const std::int64_t first = chunk * brackets.steps * kKeyTile;
  const std::int64_t end = min(numel, first + brackets.steps * kKeyTile);
#pragma unroll 1
  for (std::int64_t tile = first; tile < end; tile += kKeyTile) {
    const std::int64_t at = tile + lane * kEight;
    eight_keys<T> keys;
    keys_eight<T, kKind>(args, vector, at, args.wide, keys);
    unsigned more_than_high = 0, from_high = 0, more_than_low = 0, from_low = 0;
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      more_than_high |= unsigned(keys[j] > high) << j;
      from_high |= unsigned(keys[j] >= high) << j;
      more_than_low |= unsigned(keys[j] > low) << j;
      from_low |= unsigned(keys[j] >= low) << j;
    }
    const unsigned present = present_eight(at, numel);
    above += __popc(more_than_high & present);
    at_high += __popc(from_high & ~more_than_high & present);
    at_low += __popc(from_low & ~more_than_low & ~from_high & present);
    const unsigned inside = more_than_low & ~from_high & present;
    const int up_to_here = scan_warp(__popc(inside));
    int place = filled + up_to_here - __popc(inside);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      if (!(inside >> j & 1u)) continue;
      if (place < room) kept[place] = keys[j];
      ++place;
    }
    filled += __shfl_sync(~0u, up_to_here, 31);
  }
  above = __reduce_add_sync(~0u, above);
  at_high = __reduce_add_sync(~0u, at_high);
  at_low = __reduce_add_sync(~0u, at_low);
  if (lane != 0) return;
  int* counts = brackets.counts + 4 * slot;
  counts[0] = above, counts[1] = at_high, counts[2] = filled, counts[3] = at_low;
}

template <class T, Kind kKind>
__global__ void __launch_bounds__(kFinders)
    find_kernel(const KeyTable args, const Brackets brackets, const std::int64_t* wanted,
                const std::int64_t* chunk, const std::int64_t* before, std::int64_t* index) {
  std::int64_t* totals = dynamic_shared<std::int64_t>();
  const std::int64_t bracket = blockIdx.x, here = chunk[bracket], numel = args.numel;
  const std::int64_t rank = wanted[2 * bracket + 1];
  const auto key = key_t<T>(wanted[2 * bracket]);
  std::int64_t seen = here > 0 ? before[bracket * brackets.chunks + here - 1] : 0;
  if (threadIdx.x == 0) index[bracket] = -1;
  __syncthreads();
  const std::int64_t first = here * brackets.steps * kKeyTile;
  const std::int64_t end = min(numel, first + brackets.steps * kKeyTile);
#pragma unroll 1
  for (std::int64_t tile = first; tile < end; tile += kFinders * kEight) {
    const std::int64_t at = tile + threadIdx.x * kEight;
    eight_keys<T> keys;
    keys_eight<T, kKind>(args, brackets.of[bracket], at, args.wide, keys);
    unsigned same = 0;
#pragma unroll
    for (int j = 0; j < kEight; ++j) same |= unsigned(keys[j] == key) << j;
    same &= at < end ? present_eight(at, numel) : 0u;
    std::int64_t order = seen + scan_block(std::int64_t(__popc(same)), totals) - __popc(same);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      if (!(same >> j & 1u)) continue;
      if (++order == rank) index[bracket] = at + j;
    }
    for (int w = 0; w < kFinders / 32; ++w) seen += totals[w];
  }
}

template <class T, Kind kKind>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const KeyTable args, key_t<T> prefix, int shift, int over,
                     unsigned long long* counts) {
  const std::int64_t at = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) * kEight;
  unsigned long long* mine = counts + (std::int64_t(blockIdx.x % kHistograms) << 16);
  eight_keys<T> keys;
  keys_eight<T, kKind>(args, 0, at, args.wide, keys);
#pragma unroll
  for (int j = 0; j < kEight; ++j)
    if (at + j < args.numel && keys[j] >> over == prefix)
      atomicAdd(mine + (keys[j] >> shift & 0xffffu), 1ull);
}

// Blocks of kThreads for `vectors` of that many eights each.
unsigned blocks_of(std::int64_t vectors, std::int64_t elements) {
  return unsigned(vectors) * blocks_for((elements + kEight - 1) / kEight);
}

}  // namespace

cudaError_t magnitude_keys(const KeyTable& args, std::int64_t vectors, void* out, int device,
                           cudaStream_t stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  with_kind(args, [&](auto* x, auto kind) {
    using T = std::remove_pointer_t<decltype(x)>;
    launch(keys_kernel<T, decltype(kind)::value>, blocks_of(vectors, args.numel), kThreads, 0,
           stream, args, unsigned(vectors), static_cast<key_t<T>*>(out));
  });
  return cudaGetLastError();
}

cudaError_t sample_keys(const KeyTable& args, std::int64_t vectors, std::int64_t runs, void* out,
                        int device, cudaStream_t stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  with_kind(args, [&](auto* x, auto kind) {
    using T = std::remove_pointer_t<decltype(x)>;
    launch(sample_kernel<T, decltype(kind)::value>, blocks_of(vectors, runs * kSampleRun), kThreads,
           0, stream, args, unsigned(vectors), runs, static_cast<key_t<T>*>(out));
  });
  return cudaGetLastError();
}

cudaError_t count_brackets(const KeyTable& args, const Brackets& brackets, int device,
                           cudaStream_t stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const std::int64_t blocks = (brackets.count * brackets.chunks + kWarps - 1) / kWarps;
  with_kind(args, [&](auto* x, auto kind) {
    using T = std::remove_pointer_t<decltype(x)>;
    launch(count_kernel<T, decltype(kind)::value>, unsigned(blocks), kThreads, 0, stream, args,
           brackets);
  });
  return cudaGetLastError();
}

cudaError_t find_keys(const KeyTable& args, const Brackets& brackets, const std::int64_t* wanted,
                      const std::int64_t* chunk, const std::int64_t* before, std::int64_t* index,
                      int device, cudaStream_t stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  with_kind(args, [&](auto* x, auto kind) {
    using T = std::remove_pointer_t<decltype(x)>;
    launch(find_kernel<T, decltype(kind)::value>, unsigned(brackets.count), kFinders,
           kFinders / 32 * sizeof(std::int64_t), stream, args, brackets, wanted, chunk, before,
           index);
  });
  return cudaGetLastError();
}

cudaError_t digit_histogram(const KeyTable& args, std::int64_t prefix, int shift, int over,
                            unsigned long long* counts, int device, cudaStream_t stream) {
  if (args.numel == 0) return cudaSuccess;
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  with_kind(args, [&](auto* x, auto kind) {
    using T = std::remove_pointer_t<decltype(x)>;
    launch(histogram_kernel<T, decltype(kind)::value>, blocks_of(1, args.numel), kThreads, 0,
           stream, args, key_t<T>(prefix), shift, over, counts);
  });
  return cudaGetLastError();
}

}  // namespace mk::cuda
