// out[g, h] = sum_i sum_r sum_c f_i x_i[r, c] / d on a GPU; the arithmetic of csrc/zip_weights.h,
// the same bits.
#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace mk::cuda {

// One model of one result. In memory of the device.
struct ZipInput {
  const void* x;  // rows of `width` elements, next to each other
  std::int64_t width;
  std::int64_t row_stride;
  const std::int64_t* starts;   // members[starts[g]] ... are the rows of group g, ascending;
  const std::int64_t* members;  // both nullptr: row g alone
  // The same of columns of `inner` elements, 32-bit numbers where they are staged, else 64-bit.
  const void* column_starts;
  const void* column_members;
  double factor;  // f_i, rounded to the accumulator
};

// One result. In memory of the device.
struct Zip {
  void* out;  // contiguous
  const ZipInput* inputs;
  std::int64_t n;
  const double* divisors;  // d of each row, or of each column of `inner`; rounded
  std::int64_t by_row;     // 1 or 0
  std::int64_t numel;
  std::int64_t width;  // elements of a row
  double inverse;      // 1 / width
  std::int64_t inner;
  double inverse_inner;
  std::int64_t first;  // the first of its tiles
};

enum class Zipping : int {
  packs = 0,   // columns stay, divisors are of rows; all addresses and rows multiples of 16 bytes
  stay = 1,    // columns stay, divisors are of rows
  gather = 2,  // columns are read where they are
  staged = 3,  // a tile is a row, whose sums over rows of inputs are gathered in shared memory
};

constexpr int kZipTile = 256;  // of other tiles: packs of 16 bytes, or elements

struct ZipWeights {
  const Zip* zips;      // on the device
  const int* owners;    // on the device: the result of each tile
  std::int64_t tiles;   // >= 0
  std::int64_t shared;  // staged: accumulators of the widest input, bytes up to 48 KiB
  DType dtype;          // of inputs and results
  Zipping zipping;
};

// Enqueues on `stream` of device number `device` and does not wait. The tables must stay in place
// until the stream has passed the kernel.
cudaError_t zip_weights(const ZipWeights& args, int device, cudaStream_t stream);

}  // namespace mk::cuda
