// variance_mask on a GPU; the arithmetic of csrc/variance_mask.h.
#pragma once

#include "kth_magnitude.cuh"

namespace mk::cuda {

// Elements of a block of threads: what one row of `squares` is about.
constexpr std::int64_t kVarianceTile = 256 * 8;

struct VarianceMask {
  KeyTable source;
  std::uint64_t threshold;  // keys above it are kept, and equal ones at indices below `cut`
  std::int64_t cut;
  std::uint8_t* bits;  // as numpy.packbits has them; nullptr: everything is kept
  double* squares;     // [tiles, n]: sum of d_i^2 over what is kept
};

// Enqueues on `stream` and does not wait.
cudaError_t variance_mask(const VarianceMask& args, int device, cudaStream_t stream);

}  // namespace mk::cuda
