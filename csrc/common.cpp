#include "common.h"

namespace mk {
namespace {

template <class T, class A>
MK_INLINE void round_all(const A* values, T* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) narrow(values[i], out + i);
}
MK_CLONES void round_to(const float* v, float* o, std::int64_t n) { round_all(v, o, n); }
MK_CLONES void round_to(const float* v, double* o, std::int64_t n) { round_all(v, o, n); }
MK_CLONES void round_to(const float* v, f16* o, std::int64_t n) { round_all(v, o, n); }
MK_CLONES void round_to(const float* v, bf16* o, std::int64_t n) { round_all(v, o, n); }
MK_CLONES void round_to(const double* v, float* o, std::int64_t n) { round_all(v, o, n); }
MK_CLONES void round_to(const double* v, double* o, std::int64_t n) { round_all(v, o, n); }
MK_CLONES void round_to(const double* v, f16* o, std::int64_t n) { round_all(v, o, n); }
MK_CLONES void round_to(const double* v, bf16* o, std::int64_t n) { round_all(v, o, n); }

template <class A>
void write_any(const View& v, std::int64_t begin, std::int64_t n, const A* values) {
  with_type(v.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    T* data = static_cast<T*>(v.data);
    if (v.contiguous()) return round_to(values, data + begin, n);
    T rounded[kBlock];
    round_to(values, rounded, n);
    Walk walk(v, begin);
    for (std::int64_t i = 0; i < n; ++i, walk.next()) data[walk.offset()] = rounded[i];
  });
}

}  // namespace

void write_block(const View& v, std::int64_t begin, std::int64_t n, const float* values) {
  write_any(v, begin, n, values);
}
void write_block(const View& v, std::int64_t begin, std::int64_t n, const double* values) {
  write_any(v, begin, n, values);
}

}  // namespace mk
