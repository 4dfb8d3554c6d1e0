// Dot products of N vectors, or of each row of N matrices, in float64 on a GPU; csrc/gram.h has the
// formula. A product joins its sum without a rounding of its own, which changes no bit where it is
// exact: for all types but float64, without a base.
#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace mk::cuda {

// A matrix of which every row is a vector.
struct GramMatrix {
  std::int64_t address, row, column;  // strides in elements
};
static_assert(sizeof(GramMatrix) == 3 * 8, "read from a table of int64");

// Sums that each program of `dots` forms of each chunk of a row: of the pairs i <= j of two or four
// matrices (3 or 10), or of four with four others (16).
enum class GramSet { two, four, cross };

struct GramDots {
  double* partial;             // on the device: [sets, sums, chunks, rows]
  const GramMatrix* matrices;  // on the device: n, then the base if there is one
  const std::int64_t* firsts;  // on the device: [2, sets], the first matrices of each set; one past
                               // the last matrix counts as the last
  DType dtype;
  GramSet set;
  bool based;
  bool wide;  // columns side by side, and every row at a multiple of 16 bytes
  std::int64_t sets, n, rows, width;
  int chunk;  // columns of a chunk
  std::int64_t chunks;
  int lanes;  // threads that share a chunk: a power of two up to 32
};

struct GramSums {
  double* out;                // on the device: [rows, n, n]
  const double* partial;      // on the device: [slots, chunks, rows]
  const std::int64_t* pairs;  // on the device: [pairs, 3]: i, j and their slot
  std::int64_t n, rows, chunks, count;
  int lanes;  // threads that share a row's sum: a power of two up to 32, or kSummed
};

constexpr int kSummed = 256;

// Enqueue on `stream` of device number `device` and do not wait. The tables must stay in place
// until the stream has passed the kernel.
cudaError_t gram_dots(const GramDots& args, int device, cudaStream_t stream);
cudaError_t gram_sums(const GramSums& args, int device, cudaStream_t stream);

}  // namespace mk::cuda
