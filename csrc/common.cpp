#include "common.h"

#include <algorithm>

namespace mk {
namespace {

template <class A, class T>
MK_CLONES void round_to(const A* values, T* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) narrow(values[i], out + i);
}

template <class A>
void write_any(const View& v, std::int64_t begin, std::int64_t n, const A* values) {
  with_type(v.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    T* data = static_cast<T*>(v.data);
    if (v.contiguous() && !v.stream) return round_to(values, data + begin, n);
    alignas(64) T rounded[kBlock];
    round_to(values, rounded, n);
    if (v.contiguous()) return stream_copy(data + begin, rounded, std::size_t(n) * sizeof(T));
    Walk walk(v, begin);
    for (std::int64_t i = 0; i < n; ++i, walk.next()) data[walk.offset()] = rounded[i];
  });
}

template <class A, class T>
MK_CLONES void round_in_place(A* values, std::int64_t n, T*) {
  for (std::int64_t i = 0; i < n; ++i) {
    T rounded;
    narrow(values[i], &rounded);
    values[i] = widen(rounded);
  }
}

}  // namespace

void stream_copy(void* to, const void* from, std::size_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const std::size_t head = std::min(bytes, -reinterpret_cast<std::uintptr_t>(out) % kLine);
  std::memcpy(out, in, head);
  out += head, in += head, bytes -= head;
  for (; bytes >= kLine; out += kLine, in += kLine, bytes -= kLine) stream_line(out, in);
  std::memcpy(out, in, bytes);
}

void stream_fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

void write_block(const View& v, std::int64_t begin, std::int64_t n, const float* values) {
  write_any(v, begin, n, values);
}
void write_block(const View& v, std::int64_t begin, std::int64_t n, const double* values) {
  write_any(v, begin, n, values);
}

void round_block(DType dtype, float* values, std::int64_t n) {
  if (dtype == DType::bf16) round_in_place(values, n, static_cast<bf16*>(nullptr));
  if (dtype == DType::f16) round_in_place(values, n, static_cast<f16*>(nullptr));
}
void round_block(DType, double*, std::int64_t) {}

}  // namespace mk
