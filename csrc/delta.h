// Blocks of x - base in the accumulator type, each difference rounded once; x itself without base.
#pragma once

#include "common.h"

namespace mk {
namespace {

template <class T>
MK_CLONES void subtract(const T* x, const T* base, acc_t<T>* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = widen(x[i]) - widen(base[i]);
}

template <class T>
MK_CLONES void copy_widened(const T* x, acc_t<T>* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = widen(x[i]);
}

// base == nullptr stands for zero.
template <class T>
void delta_block(const View& x, const T* base, std::int64_t begin, std::int64_t n, T* gathered,
                 acc_t<T>* out) {
  const T* values = read_block(x, begin, n, gathered);
  if (base)
    subtract(values, base, out, n);
  else
    copy_widened(values, out, n);
}

}  // namespace
}  // namespace mk
