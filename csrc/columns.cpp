#include "columns.h"

#include <algorithm>

#include "transpose.h"
#if defined(__x86_64__) && defined(__GNUC__)
#define MK_AVX512 __attribute__((target("avx512f,avx512bw")))
#include <immintrin.h>
#endif

namespace mk {
namespace {

// Columns whose part of a row is one cache line.
template <class T>
constexpr int kColumns = int(kLine / sizeof(T));

template <class T>
struct Register {
  typedef T Word __attribute__((vector_size(16)));
  typedef T Line __attribute__((vector_size(kLine)));
};

// ---- AVX-512: four blocks at once, one in each quarter of a register ---------------------------

#ifdef MK_AVX512

bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  return has;
}

typedef std::uint16_t Line16 __attribute__((vector_size(kLine)));
typedef std::uint32_t Line32 __attribute__((vector_size(kLine)));
typedef std::uint64_t Line64 __attribute__((vector_size(kLine)));
typedef std::uint64_t Half64 __attribute__((vector_size(kLine / 2)));
typedef std::uint64_t Quarter64 __attribute__((vector_size(kLine / 4)));

// The first and the second halves of the quarters of a and b, zipped.
MK_AVX512 MK_INLINE void zip(const Line16& a, const Line16& b, Line16* low, Line16* high) {
  *low = __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16,
                                 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59);
  *high = __builtin_shufflevector(a, b, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47,
                                  20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63);
}
MK_AVX512 MK_INLINE void zip(const Line32& a, const Line32& b, Line32* low, Line32* high) {
  *low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  *high = __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
MK_AVX512 MK_INLINE void zip(const Line64& a, const Line64& b, Line64* low, Line64* high) {
  *low = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
  *high = __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
}

// `transpose` in every quarter.
template <class Line, int kWords>
MK_AVX512 MK_INLINE void transpose_quarters(Line* words) {
  for (int stage = 1; stage < kWords; stage *= 2) {
    Line zipped[kWords];
    for (int i = 0; i < kWords / 2; ++i)
      zip(words[i], words[i + kWords / 2], &zipped[2 * i], &zipped[2 * i + 1]);
    for (int i = 0; i < kWords; ++i) words[i] = zipped[i];
  }
}

// Quarter q is at `at(q)`.
template <class Line, class At>
MK_AVX512 MK_INLINE Line read_quarters(At at) {
  Quarter64 a, b, c, d;
  std::memcpy(&a, at(0), sizeof(a));
  std::memcpy(&b, at(1), sizeof(b));
  std::memcpy(&c, at(2), sizeof(c));
  std::memcpy(&d, at(3), sizeof(d));
  const Half64 low = __builtin_shufflevector(a, b, 0, 1, 2, 3);
  const Half64 high = __builtin_shufflevector(c, d, 0, 1, 2, 3);
  return Line(__builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7));
}

template <class Line, class At>
MK_AVX512 MK_INLINE void write_quarters(const Line& line, At at) {
  const Line64 x = Line64(line);
  const Quarter64 a = __builtin_shufflevector(x, x, 0, 1), b = __builtin_shufflevector(x, x, 2, 3);
  const Quarter64 c = __builtin_shufflevector(x, x, 4, 5), d = __builtin_shufflevector(x, x, 6, 7);
  std::memcpy(at(0), &a, sizeof(a));
  std::memcpy(at(1), &b, sizeof(b));
  std::memcpy(at(2), &c, sizeof(c));
  std::memcpy(at(3), &d, sizeof(d));
}

// Returns the columns that are done: all, or none of less than one block. The last block may
// overlap the one before.
template <class T>
MK_AVX512 std::int64_t interleave_blocks(const T* const* rows, std::int64_t size, T* words,
                                         Ahead& ahead) {
  using Line = typename Register<T>::Line;
  constexpr int n = kTogether<T>;
  if (size < kColumns<T>) return 0;
  for (std::int64_t at = 0; at < size; at += kColumns<T>) {
    const std::int64_t j = std::min(at, size - kColumns<T>);
    Line block[n];
    ahead.ask();
    for (int r = 0; r < n; ++r) std::memcpy(&block[r], rows[r] + j, sizeof(Line));
    transpose_quarters<Line, n>(block);
    for (int c = 0; c < n; ++c)
      write_quarters(block[c], [=](int q) { return words + (j + q * n + c) * n; });
  }
  return size;
}

template <class T>
MK_AVX512 std::int64_t gather_blocks(const T* words, const std::int32_t* positions, T* out,
                                     std::int64_t width, bool stream, Ahead& ahead) {
  using Line = typename Register<T>::Line;
  constexpr int n = kTogether<T>;
  if (width < kColumns<T>) return 0;
  for (std::int64_t at = 0; at < width; at += kColumns<T>) {
    const std::int64_t j = std::min(at, width - kColumns<T>);
    Line block[n];
    ahead.ask();
    for (int c = 0; c < n; ++c)
      block[c] = read_quarters<Line>(
          [=](int q) { return words + std::int64_t(positions[j + q * n + c]) * n; });
    transpose_quarters<Line, n>(block);
    for (int r = 0; r < n; ++r)
      if (stream)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + r * width + j), __m512i(block[r]));
      else
        std::memcpy(out + r * width + j, &block[r], sizeof(Line));
  }
  return width;
}

// ---- other processors: block by block ----------------------------------------------------------

#else

bool has_avx512() { return false; }
template <class T>
std::int64_t interleave_blocks(const T* const*, std::int64_t, T*, Ahead&) {
  return 0;
}
template <class T>
std::int64_t gather_blocks(const T*, const std::int32_t*, T*, std::int64_t, bool, Ahead&) {
  return 0;
}

#endif

}  // namespace

template <class T>
void interleave(const T* const* rows, std::int64_t size, T* words, Ahead& ahead) {
  using Word = typename Register<T>::Word;
  constexpr int n = kTogether<T>;
  std::int64_t j = has_avx512() ? interleave_blocks(rows, size, words, ahead) : 0;
  for (; j + n <= size; j += n) {
    Word block[n];
    if (j % kColumns<T> == 0) ahead.ask();
    for (int r = 0; r < n; ++r) std::memcpy(&block[r], rows[r] + j, sizeof(Word));
    transpose<Word, n>(block);
    std::memcpy(words + j * n, block, sizeof(block));
  }
  for (; j < size; ++j)
    for (int r = 0; r < n; ++r) words[j * n + r] = rows[r][j];
}

template <class T>
void gather_words(const T* words, const std::int32_t* positions, T* out, std::int64_t width,
                  bool stream, Ahead& ahead) {
  using Word = typename Register<T>::Word;
  constexpr int n = kTogether<T>, step = kColumns<T>;
  const auto misaligned = reinterpret_cast<std::uintptr_t>(out) | std::uintptr_t(width) * sizeof(T);
  stream = stream && misaligned % kLine == 0;
  std::int64_t j = has_avx512() ? gather_blocks(words, positions, out, width, stream, ahead) : 0;
  for (; j + step <= width; j += step) {
    alignas(kLine) T piece[n][step];
    ahead.ask();
    for (int part = 0; part < step; part += n) {
      Word block[n];
      for (int c = 0; c < n; ++c)
        std::memcpy(&block[c], words + std::int64_t(positions[j + part + c]) * n, sizeof(Word));
      transpose<Word, n>(block);
      for (int r = 0; r < n; ++r) std::memcpy(&piece[r][part], &block[r], sizeof(Word));
    }
    for (int r = 0; r < n; ++r)
      if (stream)
        stream_line(out + r * width + j, piece[r]);
      else
        std::memcpy(out + r * width + j, piece[r], kLine);
  }
  for (; j < width; ++j)
    for (int r = 0; r < n; ++r) out[r * width + j] = words[std::int64_t(positions[j]) * n + r];
}

#define MK_COLUMNS(T)                                                     \
  template void interleave<T>(const T* const*, std::int64_t, T*, Ahead&); \
  template void gather_words<T>(const T*, const std::int32_t*, T*, std::int64_t, bool, Ahead&);
MK_COLUMNS(std::uint16_t)
MK_COLUMNS(std::uint32_t)
MK_COLUMNS(std::uint64_t)

}  // namespace mk
