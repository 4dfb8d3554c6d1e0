// Dot products of a gradient with n task vectors on a GPU; csrc/coefficient_gradients.h has the
// formula. A product joins its sum without a rounding of its own.
#pragma once

#include <cuda_runtime_api.h>

#include "../common.h"

namespace mk::cuda {

// Task vectors that a block takes: what it reads of the gradient and the base serves all of them.
constexpr int kTogether = 4;

struct CoefficientGradients {
  double* partial;  // on the device: [chunks, n]
  const void* grad;
  const std::int64_t* xs;  // on the device: addresses of the n tensors, then of the base
  DType grad_dtype;        // f32 or f64
  DType dtype;
  bool based;
  bool wide;  // everything begins at a multiple of 16 bytes
  std::int64_t n, numel;
  std::int64_t chunk;  // elements of a block, a multiple of 8
  std::int64_t chunks;
};

// Enqueues on `stream` of device number `device` and does not wait. The table must stay in place
// until the stream has passed the kernel.
cudaError_t coefficient_gradients(const CoefficientGradients& args, int device,
                                  cudaStream_t stream);

}  // namespace mk::cuda
