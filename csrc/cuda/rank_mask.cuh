// Masks of draws against limits by rank within rows, on a GPU; the arithmetic of csrc/rank_mask.h.
// mergekern/backends/row_ranks.py puts the steps together.
#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace mk::cuda {

// Keys of rows in 2 half bins each: the upper ones cut up the octaves below the largest key, the
// others the rest. An element e of [units, length, inner] is in row e / (length inner) inner +
// e % inner.
struct RowBins {
  const void* keys;  // on the device, numel keys
  bool wide;         // of 64 bits
  std::int64_t numel, length, inner;
  // On the device, [rows, 5]: least key, where the upper bins begin, largest key, shifts of both.
  const std::int64_t* rows;
  std::int64_t half;
};

struct RankMask {
  RowBins bins;
  const int* ends;    // [rows, 2 half]: elements in each bin and those below
  const int* limits;  // [length]: by rank, an element is kept if its draw is below this
  std::uint64_t k0, k1;
  std::int64_t first;  // number of the first element among the draws
  std::uint8_t* bits;
  double* sums;  // [tiles, 2]: sum of magnitudes, and of those kept
};

// Elements of a block of threads.
constexpr std::int64_t kRankTile = 256 * 8;

// Both enqueue on `stream` and do not wait. counts[rows, 2 half] are added to.
cudaError_t count_bins(const RowBins& args, int* counts, int device, cudaStream_t stream);
cudaError_t rank_mask(const RankMask& args, int device, cudaStream_t stream);

}  // namespace mk::cuda
