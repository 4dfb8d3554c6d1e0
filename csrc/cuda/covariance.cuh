// Second moments of features on tensor cores; mergekern/backends/moments.py has the scheme, of
// which these are the kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace mk::cuda {

constexpr int kPanel = 128;        // features of a panel
constexpr int kSplitWidth = 64;    // of y where values have parts
constexpr int kShallowRows = 512;  // of a sum on tensor cores, where one product of parts is enough
constexpr int kDeepRows = 32;      // where it takes six
constexpr int kParts = 3;

// Rows of one tensor among those side by side.
struct FeatureRows {
  const void* x;
  DType dtype;                  // not f64
  const std::int64_t* offsets;  // on the device: where each row begins, in elements
  std::int64_t n, width, stride;
  std::int64_t at, side;  // the first feature's place, and the features of all tensors
  bool zero;              // NaN and infinities count as 0
  bool wide;              // features side by side, and every row at a multiple of 16 elements
};

// Of every kMeasured rows, in float64: sums of x - first and of its squares; and the bits of the
// largest magnitude as float32.
struct Measured {
  double* first;           // [side]: the first row
  double* sums;            // [2, blocks, side]
  std::uint32_t* largest;  // [blocks, side]
};
constexpr int kMeasured = 512;

struct Packed {
  void* to;            // [n, padded] of x's type, or bfloat16 [kParts, n, padded]: x scale - shift
  int* deep;           // [runs of kShallowRows, panels]: 1 where a value takes more than one part
  const float* shift;  // [side]
  const float* scale;
  std::int64_t end, padded, panels;  // zeros up to column `end`
  bool split;
  bool wide;  // the first feature's place is a multiple of eight
};

// sums[s, t] = X^T Y of rows [s span, (s + 1) span), of panel tiles[0, t] of x and of `width`
// features of y, tiles[1, t].
struct Multiply {
  double* sums;               // [splits, count, kPanel, width]
  const std::int32_t* tiles;  // [2, count]
  const void *x, *y;          // [n, padded], or of kParts: multiples of 16 bytes
  const int *deep_x, *deep_y;
  DType dtype;  // f16 or bf16
  std::int64_t n, span, padded_x, padded_y, panels_x, panels_y;
  int count, splits, width;
  bool mixed;  // only runs whose panels need parts, or not, as `deep` says
  bool deep;
};

// products += the splits' sums, unscaled, and what moves them to the mean.
struct MergeProducts {
  double* products;    // [width_x, width_y]
  const double* sums;  // as Multiply leaves them
  const std::int32_t* tiles;
  const double *x, *y;  // [5, width]: unscale, delta, weighted, rest, weighted rest
  std::int64_t width_x, width_y;
  int count, splits, width;
  bool triangle;  // only i <= j
  bool first;     // the rows merge with those before, by Chan's formula
};

// Enqueue on `stream` of device number `device` and do not wait. The tables must stay in place
// until the stream has passed the kernel.
cudaError_t covariance_measure(const FeatureRows& rows, const Measured& to, int device,
                               cudaStream_t stream);
cudaError_t covariance_pack(const FeatureRows& rows, const Packed& to, int device,
                            cudaStream_t stream);
cudaError_t covariance_multiply(const Multiply& args, int device, cudaStream_t stream);
cudaError_t covariance_merge(const MergeProducts& args, int device, cudaStream_t stream);

}  // namespace mk::cuda
