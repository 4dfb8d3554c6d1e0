// Blocks of keys of Magnitudes: what kth_magnitude.cpp and bracket_count.cpp rank.
#pragma once

#include <algorithm>

#include "kth_magnitude.h"

namespace mk {
namespace {

template <class T>
MK_CLONES void to_keys(const T* x, const T* base, std::int64_t n, key_t<T>* keys) {
  if (base)
    for (std::int64_t i = 0; i < n; ++i) keys[i] = magnitude_key(widen(x[i]) - widen(base[i]));
  else
    for (std::int64_t i = 0; i < n; ++i) keys[i] = magnitude_key(widen(x[i]));
}

template <class A>
MK_CLONES void values_to_keys(const A* v, std::int64_t n, key_t<A>* keys) {
  for (std::int64_t i = 0; i < n; ++i) keys[i] = magnitude_key(v[i]);
}

// ---- variance over models ----------------------------------------------------------------------

constexpr std::int64_t kFew = 4;  // models up to which all of them fit in registers

template <int kModels, class T>
MK_CLONES void few_variances(const T* const* xs, const T* base, std::int64_t n, acc_t<T>* out) {
  using A = acc_t<T>;
  const T* x[kModels];
  for (int j = 0; j < kModels; ++j) x[j] = xs[j];
  for (std::int64_t i = 0; i < n; ++i) {
    const A b = widen(base[i]);
    A d[kModels], mean = 0, variance = 0;
#pragma GCC unroll 4
    for (int j = 0; j < kModels; ++j) d[j] = widen(x[j][i]) - b, mean += d[j];
    mean /= A(kModels);
#pragma GCC unroll 4
    for (int j = 0; j < kModels; ++j) variance += (d[j] - mean) * (d[j] - mean);
    out[i] = variance / A(kModels);
  }
}

template <class A>
MK_CLONES void add(A* sum, const A* d, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] += d[i];
}
template <class A>
MK_CLONES void add_square(A* sum, const A* d, const A* mean, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] += (d[i] - mean[i]) * (d[i] - mean[i]);
}
template <class A>
MK_CLONES void divide(A* sum, A by, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] /= by;
}

// n <= kDeltaBlock
template <class T>
void variance_block(const Magnitudes& args, std::int64_t at, std::int64_t n, acc_t<T>* out) {
  using A = acc_t<T>;
  if (args.from.base && args.n <= kFew) {
    alignas(64) T gathered[kFew + 1][kDeltaBlock];
    const T* xs[kFew];
    for (std::int64_t j = 0; j < args.n; ++j) xs[j] = read_block(args.xs[j], at, n, gathered[j]);
    const T* base = read_block(*args.from.base, at, n, gathered[kFew]);
    if (args.n == 1) return few_variances<1>(xs, base, n, out);
    if (args.n == 2) return few_variances<2>(xs, base, n, out);
    if (args.n == 3) return few_variances<3>(xs, base, n, out);
    return few_variances<4>(xs, base, n, out);
  }
  alignas(64) A d[kDeltaBlock], mean[kDeltaBlock];
  std::fill_n(mean, n, A(0));
  std::fill_n(out, n, A(0));
  for (std::int64_t j = 0; j < args.n; ++j)
    delta_block(args.xs[j], args.from, at, n, d), add(mean, d, n);
  divide(mean, A(args.n), n);
  for (std::int64_t j = 0; j < args.n; ++j)
    delta_block(args.xs[j], args.from, at, n, d), add_square(out, d, mean, n);
  divide(out, A(args.n), n);
}

// ---- blocks of keys ----------------------------------------------------------------------------

template <class T>
void key_block(const Magnitudes& args, std::int64_t at, std::int64_t n, key_t<T>* keys) {
  alignas(64) T gathered[kBlock], gathered_base[kBlock];
  if (!args.variance && !args.from.rounded) {
    const T* base = args.from.base ? read_block(*args.from.base, at, n, gathered_base) : nullptr;
    return to_keys(read_block(args.xs[0], at, n, gathered), base, n, keys);
  }
  alignas(64) acc_t<T> v[kDeltaBlock];
  for (std::int64_t i = 0, m; i < n; i += m) {
    m = std::min(kDeltaBlock, n - i);
    if (args.variance)
      variance_block<T>(args, at + i, m, v);
    else
      delta_block(args.xs[0], args.from, at + i, m, v);
    values_to_keys(v, m, keys + i);
  }
}

// Calls f(keys, first element, count) for each block of keys.
template <class F>
void for_key_blocks(const Magnitudes& args, std::int64_t begin, std::int64_t end, F&& f) {
  with_type(args.xs[0].dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    alignas(64) key_t<T> keys[kBlock];
    for (std::int64_t at = begin; at < end; at += kBlock) {
      const std::int64_t n = std::min(kBlock, end - at);
      key_block<T>(args, at, n, keys);
      f(keys, at, n);
    }
  });
}

}  // namespace
}  // namespace mk
