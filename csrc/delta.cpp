#include "delta.h"

namespace mk {
namespace {

template <class T>
MK_INLINE void subtract_each(const T* x, const T* b, acc_t<T>* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = widen(x[i]) - widen(b[i]);
}
template <class T>
MK_INLINE void widen_each(const T* x, acc_t<T>* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = widen(x[i]);
}

}  // namespace

MK_CLONES void subtract(const float* x, const float* b, float* o, std::int64_t n) {
  subtract_each(x, b, o, n);
}
MK_CLONES void subtract(const double* x, const double* b, double* o, std::int64_t n) {
  subtract_each(x, b, o, n);
}
MK_CLONES void subtract(const f16* x, const f16* b, float* o, std::int64_t n) {
  subtract_each(x, b, o, n);
}
MK_CLONES void subtract(const bf16* x, const bf16* b, float* o, std::int64_t n) {
  subtract_each(x, b, o, n);
}
MK_CLONES void widen_all(const float* x, float* o, std::int64_t n) { widen_each(x, o, n); }
MK_CLONES void widen_all(const double* x, double* o, std::int64_t n) { widen_each(x, o, n); }
MK_CLONES void widen_all(const f16* x, float* o, std::int64_t n) { widen_each(x, o, n); }
MK_CLONES void widen_all(const bf16* x, float* o, std::int64_t n) { widen_each(x, o, n); }

}  // namespace mk
