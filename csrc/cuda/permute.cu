#include "common.cuh"
#include "permute.cuh"

namespace mk::cuda {
namespace {

// kTogether: the columns of a row lie together.
template <class Unit, bool kTogether>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const Move* __restrict__ moves, const int* __restrict__ owners) {
  constexpr int kEach = kMoveTile / kThreads;
  const Move& move = moves[owners[blockIdx.x]];
  const Divisor width(move.width, move.inverse);
  const std::int64_t* const rows = global(move.rows);
  const std::int64_t* const columns = static_cast<const std::int64_t*>(move.columns);
  const Unit* const x = global(static_cast<const Unit*>(move.x));
  Unit* const out = global(static_cast<Unit*>(move.out));
  const std::int64_t begin = (blockIdx.x - move.first) * kMoveTile + threadIdx.x;
  Unit units[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const std::int64_t at = begin + i * kThreads;
    if (at >= move.numel) break;
    const std::int64_t r = width.quotient(at), c = at - r * width.by;
    units[i] = x[rows[r] + (kTogether ? c : global(columns)[c])];
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (begin + i * kThreads < move.numel) out[begin + i * kThreads] = units[i];
}

// Units that `from` lies behind a multiple of 16.
template <class Unit>
__device__ inline int lead_of(const Unit* from) {
  return int(reinterpret_cast<std::uintptr_t>(from) % 16 / sizeof(Unit));
}

// Copies a 16-byte word of memory, or what of it belongs to the `n` units from `from` on, to shared
// memory, where the first of them comes to lie lead_of(from) units behind `to`, a multiple of 16.
template <class Unit>
__device__ inline void stage_word(const Unit* from, int n, int word, Unit* to) {
  constexpr int N = 16 / sizeof(Unit);
  const int begin = word * N - lead_of(from);
  if (begin >= 0 && begin + N <= n) {
    *reinterpret_cast<uint4*>(to + word * N) = *reinterpret_cast<const uint4*>(from + begin);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (begin + i >= 0 && begin + i < n) to[word * N + i] = from[begin + i];
}

// Rows of a tile that one thread gathers from the same positions.
constexpr int kRowsTogether = 4;

template <class Unit>
__global__ void __launch_bounds__(kThreads)
    staged_kernel(const Move* __restrict__ moves, const int* __restrict__ owners) {
  constexpr int N = 16 / sizeof(Unit);
  const Move& move = moves[owners[blockIdx.x]];
  const std::int64_t* const offsets = global(move.rows);
  const int* const columns = global(static_cast<const int*>(move.columns));
  const Unit* const x = global(static_cast<const Unit*>(move.x));
  Unit* const out = global(static_cast<Unit*>(move.out));
  Unit* const shared = dynamic_shared<Unit>();
  const int width = int(move.width), source = int(move.source);
  const int words = (source + N - 1) / N + 1, pitch = words * N;
  const std::int64_t first = (blockIdx.x - move.first) * move.height;
  const std::int64_t rows = Divisor(move.width, move.inverse).quotient(move.numel);
  const std::int64_t left = rows - first;
  const int height = int(left < move.height ? left : move.height);

  for (int i = threadIdx.x; i < height * words; i += kThreads) {
    const int r = i / words;
    stage_word(x + offsets[first + r], source, i - r * words, shared + r * pitch);
  }
  __syncthreads();

  const bool wide = (reinterpret_cast<std::uintptr_t>(out) | width * sizeof(Unit)) % 16 == 0;
  const int packs = wide ? width / N : width;
  const int groups = (height + kRowsTogether - 1) / kRowsTogether;
  for (int i = threadIdx.x; i < groups * packs; i += kThreads) {
    const int group = i / packs, at = (i - group * packs) * (wide ? N : 1);
    Pack < int, N<4 ? 4 : N> place;  // of which N are used
    if (N >= 4 && wide) {
      place.read(columns + at);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) place.v[j] = j == 0 || wide ? columns[at + j] : 0;
    }
#pragma unroll
    for (int j = 0; j < kRowsTogether; ++j) {
      const int r = group * kRowsTogether + j;
      if (r >= height) break;
      const Unit* const row = shared + r * pitch + lead_of(x + offsets[first + r]);
      Unit* const to = out + (first + r) * width + at;
      if (!wide) {
        *to = row[place.v[0]];
        continue;
      }
      Pack<Unit, N> y;
#pragma unroll
      for (int k = 0; k < N; ++k) y.v[k] = row[place.v[k]];
      y.write(to);
    }
  }
}

template <class Unit>
void enqueue(const Permute& args, cudaStream_t stream) {
  const unsigned tiles = unsigned(args.tiles);
  if (args.moving == Moving::staged)
    launch(staged_kernel<Unit>, tiles, kThreads, std::size_t(args.shared), stream, args.moves,
           args.owners);
  else
    launch(args.moving == Moving::rows ? gather_kernel<Unit, true> : gather_kernel<Unit, false>,
           tiles, kThreads, 0, stream, args.moves, args.owners);
}

}  // namespace

cudaError_t permute(const Permute& args, int device, cudaStream_t stream) {
  if (args.tiles == 0) return cudaSuccess;
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  switch (args.unit) {
    case 1:
      enqueue<std::uint8_t>(args, stream);
      break;
    case 2:
      enqueue<std::uint16_t>(args, stream);
      break;
    case 4:
      enqueue<std::uint32_t>(args, stream);
      break;
    case 8:
      enqueue<std::uint64_t>(args, stream);
      break;
    case 16:
      enqueue<uint4>(args, stream);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace mk::cuda
