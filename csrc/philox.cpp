#include "philox.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers cause it
#include <immintrin.h>
#define MK_WIDE_PHILOX
#endif

namespace mk {
namespace {

constexpr std::uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u;
constexpr std::uint32_t kW0 = 0x9E3779B9u, kW1 = 0xBB67AE85u;

void blocks_of_words(PhiloxKey key, std::uint64_t first, std::int64_t blocks,
                     std::uint16_t* draws) {
  for (std::int64_t q = 0; q < blocks; ++q, draws += kDraws) {
    const std::uint64_t counter = first + std::uint64_t(q);
    PhiloxKey k = key;
    std::uint32_t c[4] = {std::uint32_t(counter), std::uint32_t(counter >> 32), 0, 0};
    for (int round = 0; round < 10; ++round, k.k0 += kW0, k.k1 += kW1) {
      const std::uint64_t p0 = std::uint64_t(kM0) * c[0], p1 = std::uint64_t(kM1) * c[2];
      c[0] = std::uint32_t(p1 >> 32) ^ c[1] ^ k.k0;
      c[1] = std::uint32_t(p1);
      c[2] = std::uint32_t(p0 >> 32) ^ c[3] ^ k.k1;
      c[3] = std::uint32_t(p0);
    }
    for (int w = 0; w < 4; ++w) {
      draws[2 * w] = std::uint16_t(c[w]);
      draws[2 * w + 1] = std::uint16_t(c[w] >> 16);
    }
  }
}

#ifdef MK_WIDE_PHILOX
// The one place with intrinsics: compilers multiply 64 by 64 bits where vpmuludq would do, and
// shuffle between the two widths, which took five times as long. A word lies in the low half of a
// 64-bit lane; what is above it is ignored by the multiplication.

__attribute__((target("avx512f"))) void groups_avx512(PhiloxKey key, std::uint64_t first,
                                                      std::int64_t groups, std::uint16_t* draws) {
  const __m512i m0 = _mm512_set1_epi64(kM0), m1 = _mm512_set1_epi64(kM1);
  const __m512i low = _mm512_set1_epi64(0xffffffff);
  const __m512i even = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i odd = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  __m512i counter = _mm512_add_epi64(_mm512_set1_epi64(std::int64_t(first)),
                                     _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  for (; groups > 0; --groups, draws += kDrawGroup * kDraws) {
    __m512i c0 = counter, c1 = _mm512_srli_epi64(counter, 32);
    __m512i c2 = _mm512_setzero_si512(), c3 = c2;
    PhiloxKey k = key;
    for (int round = 0; round < 10; ++round, k.k0 += kW0, k.k1 += kW1) {
      const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
      c0 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p1, 32), c1),
                            _mm512_set1_epi64(k.k0));
      c1 = p1;
      c2 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p0, 32), c3),
                            _mm512_set1_epi64(k.k1));
      c3 = p0;
    }
    const __m512i w01 = _mm512_or_si512(_mm512_and_si512(c0, low), _mm512_slli_epi64(c1, 32));
    const __m512i w23 = _mm512_or_si512(_mm512_and_si512(c2, low), _mm512_slli_epi64(c3, 32));
    _mm512_storeu_si512(draws, _mm512_permutex2var_epi64(w01, even, w23));
    _mm512_storeu_si512(draws + 32, _mm512_permutex2var_epi64(w01, odd, w23));
    counter = _mm512_add_epi64(counter, _mm512_set1_epi64(kDrawGroup));
  }
}

__attribute__((target("avx2"))) void groups_avx2(PhiloxKey key, std::uint64_t first,
                                                 std::int64_t groups, std::uint16_t* draws) {
  const __m256i m0 = _mm256_set1_epi64x(kM0), m1 = _mm256_set1_epi64x(kM1);
  const __m256i low = _mm256_set1_epi64x(0xffffffff);
  __m256i counter =
      _mm256_add_epi64(_mm256_set1_epi64x(std::int64_t(first)), _mm256_setr_epi64x(0, 1, 2, 3));
  for (groups *= 2; groups > 0; --groups, draws += 4 * kDraws) {
    __m256i c0 = counter, c1 = _mm256_srli_epi64(counter, 32);
    __m256i c2 = _mm256_setzero_si256(), c3 = c2;
    PhiloxKey k = key;
    for (int round = 0; round < 10; ++round, k.k0 += kW0, k.k1 += kW1) {
      const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1),
                            _mm256_set1_epi64x(k.k0));
      c1 = p1;
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3),
                            _mm256_set1_epi64x(k.k1));
      c3 = p0;
    }
    const __m256i w01 = _mm256_or_si256(_mm256_and_si256(c0, low), _mm256_slli_epi64(c1, 32));
    const __m256i w23 = _mm256_or_si256(_mm256_and_si256(c2, low), _mm256_slli_epi64(c3, 32));
    const __m256i a = _mm256_unpacklo_epi64(w01, w23), b = _mm256_unpackhi_epi64(w01, w23);
    __m256i* out = reinterpret_cast<__m256i*>(draws);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(a, b, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(a, b, 0x31));
    counter = _mm256_add_epi64(counter, _mm256_set1_epi64x(4));
  }
}
#endif

}  // namespace

void philox_draws(PhiloxKey key, std::uint64_t first, std::int64_t blocks, std::uint16_t* draws) {
#ifdef MK_WIDE_PHILOX
  const std::int64_t groups = (blocks + kDrawGroup - 1) / kDrawGroup;
  if (__builtin_cpu_supports("avx512f")) return groups_avx512(key, first, groups, draws);
  if (__builtin_cpu_supports("avx2")) return groups_avx2(key, first, groups, draws);
#endif
  blocks_of_words(key, first, blocks, draws);
}

}  // namespace mk
