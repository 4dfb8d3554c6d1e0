// Element types, conversions and 16-byte access shared by the CUDA kernels; only .cu files include
// this. The bits are those of csrc/common.h, except that a NaN may carry another payload.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../common.h"

namespace mk::cuda {

// ---- arithmetic: the intrinsics are never contracted to FMA, whatever the compiler's flags -----

__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }
__device__ inline float div(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline double div(double a, double b) { return __ddiv_rn(a, b); }

// ---- widening: exact ---------------------------------------------------------------------------

__device__ inline float load(float x) { return x; }
__device__ inline double load(double x) { return x; }
__device__ inline float load(bf16 x) { return __uint_as_float(std::uint32_t(x.bits) << 16); }
__device__ inline float load(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

// ---- narrowing: round to nearest, ties to even -------------------------------------------------

__device__ inline void store(float x, float* y) { *y = x; }
__device__ inline void store(float x, double* y) { *y = x; }
__device__ inline void store(float x, bf16* y) {
  y->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ inline void store(float x, f16* y) { y->bits = __half_as_ushort(__float2half_rn(x)); }

__device__ inline void store(double x, double* y) { *y = x; }
__device__ inline void store(double x, float* y) { *y = __double2float_rn(x); }
// A double reaches a 16-bit type through a float rounded to odd, so that it is rounded only once.
// The conversion instruction from double to 16 bits would do for f16, but none exists for bf16.
__device__ inline float to_odd(double x) {
  const float y = __double2float_rz(x);
  const bool exact = double(y) == x || x != x;
  return exact ? y : __uint_as_float(__float_as_uint(y) | 1u);
}
__device__ inline void store(double x, bf16* y) { store(to_odd(x), y); }
__device__ inline void store(double x, f16* y) { store(to_odd(x), y); }

// Tells the compiler that an address read from a table is global memory: LDG instead of LD.
template <class T>
__device__ inline T* global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

// Divides numbers from 0 to 2^50 by one known before the launch: a product with its inverse is off
// by one at most. A 64-bit division would be a call of some 100 instructions.
struct Divisor {
  explicit Divisor(std::int64_t by) : by(by), inverse(1.0 / double(by)) {}
  __device__ Divisor(std::int64_t by, double inverse) : by(by), inverse(inverse) {}
  __device__ std::int64_t quotient(std::int64_t a) const {
    const std::int64_t near = std::int64_t(mul(double(a), inverse));
    const std::int64_t rest = a - near * by;
    return near + (rest >= by) - (rest < 0);
  }
  __device__ std::int64_t remainder(std::int64_t a) const { return a - quotient(a) * by; }

  std::int64_t by;
  double inverse;
};

// ---- 16-byte access ----------------------------------------------------------------------------

// Elements one thread takes at a time, so that both its reads and its writes fill 16 bytes.
template <class In, class Out>
constexpr int kPack = 16 / (sizeof(In) < sizeof(Out) ? sizeof(In) : sizeof(Out));

// N elements held in registers, moved by 16-byte instructions: `p` is a multiple of 16.
template <class T, int N>
struct alignas(16) Pack {
  static_assert(N * sizeof(T) % 16 == 0, "a pack is a whole number of 16-byte words");
  static constexpr int kWords = N * sizeof(T) / 16;
  T v[N];

  // A plain load and not ld.global.nc: a kernel may write over its own input.
  __device__ void read(const T* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      reinterpret_cast<uint4*>(v)[i] = reinterpret_cast<const uint4*>(p)[i];
  }
  __device__ void write(T* p) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(v)[i];
  }
};

// ---- launching ---------------------------------------------------------------------------------

// kernel<<<blocks, threads, shared, stream>>>(args...), which is no C++: tests/kernels/host_cuda
// runs the same kernels on a host.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, std::size_t shared,
            cudaStream_t stream, Args... args) {
#ifdef __CUDACC__
  kernel<<<blocks, threads, shared, stream>>>(args...);
#else
  (void)stream;
  host_cuda::run(blocks, threads, shared, [&] { kernel(Parameters(args)...); });
#endif
}

// The bytes of shared memory that a launch asks for, from a multiple of 16 on.
template <class T>
__device__ inline T* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#else
  return static_cast<T*>(host_cuda::dynamic_shared);
#endif
}

// Makes `device` current for a scope; kernels are launched on the device of the caller's stream.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

constexpr int kThreads = 256;

// Blocks of kThreads for `items`, at most what a grid holds; kernels stride over the rest.
inline unsigned blocks_for(std::int64_t items) {
  const std::int64_t blocks = (items + kThreads - 1) / kThreads;
  return unsigned(blocks < 0x7fffffff ? blocks : 0x7fffffff);
}

}  // namespace mk::cuda
