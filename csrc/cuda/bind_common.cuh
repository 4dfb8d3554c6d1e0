// What the files that bind mergekern._cuda share.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mk::cuda {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

// The one error of a launch: op, device and sizes, and what CUDA says.
inline void check(cudaError_t error, const char* op, int device, const std::string& sizes) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": CUDA failed on device " + std::to_string(device) +
                           " with " + sizes + "; got " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

}  // namespace mk::cuda
