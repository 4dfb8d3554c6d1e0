// out_e = sum_i w_ir x_ie with r = e / inner % k on a GPU; the arithmetic of csrc/weighted_rows.h,
// the same bits.
#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace mk::cuda {

struct WeightedRows {
  void* out;              // contiguous; may be one of the inputs, no other overlap
  DType out_dtype;        // need not be x_dtype
  const void* const* xs;  // on the device: n addresses of contiguous tensors
  DType x_dtype;
  const void* weights;  // on the device: [n, k] values of the accumulator, sum_t
  std::int64_t n;       // >= 1
  std::int64_t numel;   // of every tensor, >= 0
  std::int64_t k;       // >= 1
  std::int64_t inner;   // >= 1
  bool wide;            // out and all n addresses are multiples of 16
};

// Enqueues on `stream` of device number `device` and does not wait. The tables must stay in place
// until the stream has passed the kernel.
cudaError_t weighted_rows(const WeightedRows& args, int device, cudaStream_t stream);

}  // namespace mk::cuda
