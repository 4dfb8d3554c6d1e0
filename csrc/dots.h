// What gram.cpp and coefficient_gradients.cpp form dot products with: four doubles at a time,
// blocks as these read them.
#pragma once

#include "gram.h"

namespace mk {
namespace {

constexpr std::int64_t kAhead = 2;  // blocks that are asked for before their use

// Four doubles: a register of AVX2. AVX-512 is not asked for: with halves of its registers GCC
// scatters the conversions, and what is read from memory does not come faster than this takes it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MK_DOT_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define MK_DOT_CLONES
#endif
constexpr int kFour = 4;
using Four = double __attribute__((vector_size(kFour * sizeof(double))));

template <class T>
MK_INLINE void load(const T* x, Four* v) {
  *v = Four{double(x[0]), double(x[1]), double(x[2]), double(x[3])};
}

MK_INLINE void add_to(double* sum, const Four& lanes) {
  Four total;
  std::memcpy(&total, sum, sizeof(total));
  total += lanes;
  std::memcpy(sum, &total, sizeof(total));
}

template <class T>
MK_CLONES void subtract(const T* x, const T* base, double* out, std::int64_t n) {
  if (base)
    for (std::int64_t i = 0; i < n; ++i) out[i] = double(widen(x[i])) - double(widen(base[i]));
  else
    for (std::int64_t i = 0; i < n; ++i) out[i] = double(widen(x[i]));
}

template <class T>
MK_CLONES void widen_all(const T* x, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = widen(x[i]);
}

// A block as the products read it: 16-bit types, which take several steps to widen, as floats.
template <class T, bool kNarrow = sizeof(T) == 2>
struct Block {
  T values[kGramBlock];
  const T* read(const View& v, std::int64_t at, std::int64_t n) {
    return read_block(v, at, n, values);
  }
};
template <class T>
struct Block<T, true> {
  float values[kGramBlock];
  const float* read(const View& v, std::int64_t at, std::int64_t n) {
    T gathered[kGramBlock];
    widen_all(read_block(v, at, n, gathered), values, n);
    return values;
  }
};

}  // namespace
}  // namespace mk
