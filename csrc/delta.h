// Blocks of x - base in the accumulator type, each difference rounded once; x itself without base.
#pragma once

#include "common.h"

namespace mk {

void subtract(const float* x, const float* base, float* out, std::int64_t n);
void subtract(const double* x, const double* base, double* out, std::int64_t n);
void subtract(const f16* x, const f16* base, float* out, std::int64_t n);
void subtract(const bf16* x, const bf16* base, float* out, std::int64_t n);
void widen_all(const float* x, float* out, std::int64_t n);
void widen_all(const double* x, double* out, std::int64_t n);
void widen_all(const f16* x, float* out, std::int64_t n);
void widen_all(const bf16* x, float* out, std::int64_t n);

// base == nullptr stands for zero.
template <class T>
inline void delta_block(const View& x, const T* base, std::int64_t begin, std::int64_t n,
                        T* gathered, acc_t<T>* out) {
  const T* values = read_block(x, begin, n, gathered);
  if (base)
    subtract(values, base, out, n);
  else
    widen_all(values, out, n);
}

}  // namespace mk
