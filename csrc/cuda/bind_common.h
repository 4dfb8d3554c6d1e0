// What every bind_*.cpp of module _cuda shares.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../bind_common.h"

// The one error of a launch: op, device and sizes, and what CUDA says.
inline void check(cudaError_t error, const char* op, int device, const std::string& sizes) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": CUDA failed on device " + std::to_string(device) +
                           " with " + sizes + "; got " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

// A grid has so many blocks at most.
constexpr std::int64_t kBlocks = std::int64_t(1) << 31;
