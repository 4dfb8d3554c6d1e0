#include "weighted_sum.h"

#include <algorithm>

namespace mk {
namespace {

template <class T>
MK_INLINE void scale_all(const T* x, acc_t<T> w, acc_t<T>* acc, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) acc[i] = widen(x[i]) * w;
}
MK_CLONES void scale(const float* x, float w, float* a, std::int64_t n) { scale_all(x, w, a, n); }
MK_CLONES void scale(const double* x, double w, double* a, std::int64_t n) { scale_all(x, w, a, n); }
MK_CLONES void scale(const f16* x, float w, float* a, std::int64_t n) { scale_all(x, w, a, n); }
MK_CLONES void scale(const bf16* x, float w, float* a, std::int64_t n) { scale_all(x, w, a, n); }

template <class T>
MK_INLINE void axpy_all(const T* x, acc_t<T> w, acc_t<T>* acc, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) acc[i] += widen(x[i]) * w;
}
MK_CLONES void axpy(const float* x, float w, float* a, std::int64_t n) { axpy_all(x, w, a, n); }
MK_CLONES void axpy(const double* x, double w, double* a, std::int64_t n) { axpy_all(x, w, a, n); }
MK_CLONES void axpy(const f16* x, float w, float* a, std::int64_t n) { axpy_all(x, w, a, n); }
MK_CLONES void axpy(const bf16* x, float w, float* a, std::int64_t n) { axpy_all(x, w, a, n); }

MK_CLONES void divide(float* a, float d, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) a[i] /= d;
}
MK_CLONES void divide(double* a, double d, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) a[i] /= d;
}

}  // namespace

void weighted_sum(const WeightedSum& args, std::int64_t begin, std::int64_t end) {
  with_type(args.xs[0].dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = acc_t<T>;
    alignas(64) T gathered[kBlock];
    alignas(64) A acc[kBlock];
    for (std::int64_t at = begin; at < end; at += kBlock) {
      const std::int64_t n = std::min(kBlock, end - at);
      scale(read_block(args.xs[0], at, n, gathered), A(args.weights[0]), acc, n);
      for (std::int64_t i = 1; i < args.n; ++i)
        axpy(read_block(args.xs[i], at, n, gathered), A(args.weights[i]), acc, n);
      if (args.divisor != 1.0) divide(acc, A(args.divisor), n);
      write_block(args.out, at, n, acc);
    }
  });
}

}  // namespace mk
