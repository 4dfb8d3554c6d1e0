// Keys of |x - base| or of variances, and exact selection among them, on a GPU; the arithmetic of
// csrc/kth_magnitude.h. mergekern/backends/selection.py puts the steps together.
#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace mk::cuda {

struct KeyTable {
  const void* base;       // contiguous; nullptr: zero
  const void* const* xs;  // on the device, n contiguous tensors
  DType dtype;            // of base and tensors
  std::int64_t n;         // >= 1
  std::int64_t numel;
  bool rounded;   // differences are, to `dtype`
  bool variance;  // one vector, the variances over all tensors; else each tensor is one
  bool wide;      // base and all tensors begin at multiples of 16
};

// Elements that a warp takes at a time; a chunk is `steps` of these, one after another.
constexpr std::int64_t kKeyTile = 32 * 8;
// Neighbours that are sampled together.
constexpr std::int64_t kSampleRun = 16;
// Histograms that blocks take in turn, so that fewer of them add to one place.
constexpr std::int64_t kHistograms = 8;

// Keys of a vector against two of them, low <= high. All on the device; K is the key's integer.
struct Brackets {
  const std::int64_t* of;  // [count]: the vector
  const void* edges;       // K [count, 2]: low, high
  int* counts;             // [count, chunks, 4]: > high, == high, between, == low != high
  void*
      kept;  // K [count, chunks, room], those between in order as far as there is room; or nullptr
  std::int64_t count, chunks, steps, room;
};

// A selection byte by byte of what was kept, less `low`.
struct Descent {
  std::int64_t* state;  // [rounds + 1, count, 2]: bytes so far, rank among what they leave
  unsigned long long* histograms;  // [rounds, count, 256], zeros at first
  bool wide;                       // keys have 64 bits
};

// All enqueue on `stream` and do not wait.
cudaError_t magnitude_keys(const KeyTable& args, std::int64_t vectors, void* out, int device,
                           cudaStream_t stream);
// Keys of one run in each of `runs` equal strata, which hold 32 elements at least.
cudaError_t sample_keys(const KeyTable& args, std::int64_t vectors, std::int64_t runs, void* out,
                        int device, cudaStream_t stream);
cudaError_t count_brackets(const KeyTable& args, const Brackets& brackets, int device,
                           cudaStream_t stream);
// Counts the byte of `round` where the bytes above it are the chosen ones.
cudaError_t count_bytes(const Brackets& brackets, const Descent& descent, int round, int device,
                        cudaStream_t stream);
// found[b] = key, count above, count equal, -, rank, whether the bracket held it; ties[b, c] = how
// often chunk c holds the key. totals: sums of counts over chunks. wanted: ranks from 1.
cudaError_t count_ties(const Brackets& brackets, const Descent& descent, const std::int64_t* totals,
                       const std::int64_t* wanted, std::int64_t* found, int* ties, int device,
                       cudaStream_t stream);
// The index of the rank-th element of a key or -1. wanted[b]: key, rank from 1; chunk[b]: where it
// lies; before[b, c]: such elements up to the end of chunk c. Counts and keys are not used.
cudaError_t find_keys(const KeyTable& args, const Brackets& brackets, const std::int64_t* wanted,
                      const std::int64_t* chunk, const std::int64_t* before, std::int64_t* index,
                      int device, cudaStream_t stream);
// Adds the 16-bit digit at `shift` of every key of the first vector that is `prefix` from bit
// `over` on to counts[kHistograms, 65536].
cudaError_t digit_histogram(const KeyTable& args, std::int64_t prefix, int shift, int over,
                            unsigned long long* counts, int device, cudaStream_t stream);

}  // namespace mk::cuda
