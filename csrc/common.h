// Element types, conversions and block access shared by every CPU kernel.
//
// Kernels work on blocks of `kBlock` elements that stay in the first-level cache: a block is read
// from its tensor in the stored type, widened to the accumulator type, and rounded once when it
// is written. All arithmetic is plain IEEE: the files are compiled with -ffp-contract=off.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

// Leaf functions (and templates) marked MK_CLONES are compiled for AVX-512, AVX2 and baseline
// x86-64; the loader picks one. Other compilers and machines get the baseline.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MK_CLONES
#endif
#define MK_INLINE static inline __attribute__((always_inline))

namespace mk {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

struct f16 {
  std::uint16_t bits;
};
struct bf16 {
  std::uint16_t bits;
};

// A tensor as kernels see it: elements in C order of `shape`, strides in elements. Adjacent
// dimensions are collapsed by the caller, so a contiguous tensor has ndim 1 and stride 1.
constexpr int kMaxDims = 65;  // torch allows 64, and permute may put one in front
struct View {
  void* data;
  DType dtype;
  int ndim;
  std::int64_t shape[kMaxDims];
  std::int64_t strides[kMaxDims];
  bool stream;  // outputs larger than the caches: write past them
  bool contiguous() const { return ndim == 0 || (ndim == 1 && (strides[0] == 1 || shape[0] == 1)); }
};

constexpr std::int64_t kBlock = 1024;

// The accumulator of each stored type, and the unsigned integer as wide as it.
template <class T>
struct Traits {
  using Acc = float;
  using Key = std::uint32_t;
};
template <>
struct Traits<double> {
  using Acc = double;
  using Key = std::uint64_t;
};
template <class T>
using acc_t = typename Traits<T>::Acc;
template <class T>
using key_t = typename Traits<T>::Key;
// The accumulator of weighted sums. float32 inputs have a double's: a float's roundings would show
// in the result. 16-bit inputs keep a float: there a double took 1.3 to 1.9 times as long.
template <class T>
using sum_t = std::conditional_t<sizeof(T) == 2, float, double>;

template <class To, class From>
MK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- widening: exact -------------------------------------------------------------------------

MK_INLINE float widen(float x) { return x; }
MK_INLINE double widen(double x) { return x; }
MK_INLINE float widen(bf16 x) { return bit_cast<float>(std::uint32_t(x.bits) << 16); }
MK_INLINE float widen(f16 x) {
  // Normal numbers are re-biased; subnormal ones get an implicit bit that a subtraction removes.
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000u) << 16;
  const std::uint32_t shifted = magnitude << 13;
  const std::uint32_t normal = shifted + 0x38000000u;
  const std::uint32_t special = shifted + 0x70000000u;
  const float lifted = bit_cast<float>(shifted + 0x38800000u) - bit_cast<float>(0x38800000u);
  const std::uint32_t subnormal = bit_cast<std::uint32_t>(lifted);
  std::uint32_t bits = magnitude < 0x0400u ? subnormal : normal;
  bits = magnitude >= 0x7c00u ? special : bits;
  return bit_cast<float>(bits | sign);
}

// ---- narrowing: round to nearest, ties to even; every NaN becomes the quiet NaN of its sign ----

MK_INLINE void narrow(float x, float* y) { *y = x; }
MK_INLINE void narrow(float x, double* y) { *y = x; }
MK_INLINE void narrow(float x, bf16* y) {
  const std::uint32_t u = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const std::uint32_t nan = ((u >> 16) & 0x8000u) | 0x7fc0u;
  y->bits = std::uint16_t((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}
MK_INLINE void narrow(float x, f16* y) {
  const std::uint32_t u = bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  const std::uint32_t a = u & 0x7fffffffu;
  const std::uint32_t normal = (a - 0x38000000u + 0x0fffu + ((a >> 13) & 1u)) >> 13;
  // Below 2^-14 the addition of 0.5 rounds at 2^-24, the spacing of subnormal halves.
  const std::uint32_t subnormal =
      bit_cast<std::uint32_t>(bit_cast<float>(a) + 0.5f) - bit_cast<std::uint32_t>(0.5f);
  std::uint32_t h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;  // 65520 and above round to infinity
  h = a > 0x7f800000u ? 0x7e00u : h;
  y->bits = std::uint16_t(h | sign);
}

MK_INLINE void narrow(double x, double* y) { *y = x; }
MK_INLINE void narrow(double x, float* y) { *y = static_cast<float>(x); }
// A double reaches a 16-bit type through a float rounded to odd, so that it is rounded only once.
MK_INLINE float to_odd(double x) {
  const float y = static_cast<float>(x);
  const double back = y;
  std::uint32_t bits = bit_cast<std::uint32_t>(y);
  if (back == x || x != x) return y;
  if (__builtin_fabs(back) > __builtin_fabs(x)) bits -= 1;
  return bit_cast<float>(bits | 1u);
}
MK_INLINE void narrow(double x, bf16* y) { narrow(to_odd(x), y); }
MK_INLINE void narrow(double x, f16* y) { narrow(to_odd(x), y); }

// ---- block access ----------------------------------------------------------------------------

// Walks the elements of a strided view in C order from a given element on.
class Walk {
 public:
  Walk(const View& v, std::int64_t begin) : v_(v) {
    for (int d = v.ndim - 1; d >= 0; --d) {
      index_[d] = begin % v.shape[d];
      begin /= v.shape[d];
      offset_ += index_[d] * v.strides[d];
    }
  }
  std::int64_t offset() const { return offset_; }
  void next() {
    for (int d = v_.ndim - 1; d >= 0; --d) {
      offset_ += v_.strides[d];
      if (++index_[d] < v_.shape[d]) return;
      offset_ -= v_.shape[d] * v_.strides[d];
      index_[d] = 0;
    }
  }

 private:
  const View& v_;
  std::int64_t index_[kMaxDims] = {};
  std::int64_t offset_ = 0;
};

// Elements [begin, begin + n) of `v`: a pointer into the tensor, or into `scratch` if strided.
template <class T>
inline const T* read_block(const View& v, std::int64_t begin, std::int64_t n, T* scratch) {
  const T* data = static_cast<const T*>(v.data);
  if (v.contiguous()) return data + begin;
  Walk walk(v, begin);
  for (std::int64_t i = 0; i < n; ++i, walk.next()) scratch[i] = data[walk.offset()];
  return scratch;
}

// Asks for elements [begin, begin + n) ahead of their use.
template <class T>
MK_INLINE void prefetch_block(const View& v, std::int64_t begin, std::int64_t n) {
  if (!v.contiguous()) return;
  const char* from = reinterpret_cast<const char*>(static_cast<const T*>(v.data) + begin);
  for (std::int64_t i = 0; i < n * std::int64_t(sizeof(T)); i += 64) __builtin_prefetch(from + i);
}

// memcpy for destinations that will not be read soon: whole lines go to memory without being
// fetched first. stream_fence() orders such writes before what follows.
void stream_copy(void* to, const void* from, std::size_t bytes);
void stream_fence();

// One aligned cache line of it.
constexpr std::size_t kLine = 64;
MK_INLINE void stream_line(void* to, const void* from) {
#ifdef __SSE2__
  for (std::size_t i = 0; i < kLine; i += sizeof(__m128i))
    _mm_stream_si128(
        reinterpret_cast<__m128i*>(static_cast<char*>(to) + i),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + i)));
#else
  std::memcpy(to, from, kLine);
#endif
}

// Rounds n accumulators into elements [begin, begin + n) of `v`.
void write_block(const View& v, std::int64_t begin, std::int64_t n, const float* values);
void write_block(const View& v, std::int64_t begin, std::int64_t n, const double* values);

// Rounds n accumulators to `dtype`, whose accumulator they are, and widens them again.
void round_block(DType dtype, float* values, std::int64_t n);
void round_block(DType dtype, double* values, std::int64_t n);

// ---- magnitudes: the bits of |x| order as unsigned integers, every NaN above infinity ----------

constexpr std::uint32_t kNanKey32 = 0x7f800001u;
constexpr std::uint64_t kNanKey64 = 0x7ff0000000000001ull;

MK_INLINE std::uint32_t magnitude_bits(float x) { return bit_cast<std::uint32_t>(x) & 0x7fffffffu; }
MK_INLINE std::uint64_t magnitude_bits(double x) {
  return bit_cast<std::uint64_t>(x) & 0x7fffffffffffffffull;
}
MK_INLINE std::uint32_t magnitude_key(float x) {
  const std::uint32_t key = magnitude_bits(x);
  return key < kNanKey32 ? key : kNanKey32;
}
MK_INLINE std::uint64_t magnitude_key(double x) {
  const std::uint64_t key = magnitude_bits(x);
  return key < kNanKey64 ? key : kNanKey64;
}

// Calls f with a null pointer of the element type: `with_type(dtype, [&](auto* t) { ... })`.
template <class F>
inline void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::f16:
      return f(static_cast<f16*>(nullptr));
    case DType::bf16:
      return f(static_cast<bf16*>(nullptr));
  }
}

}  // namespace mk
