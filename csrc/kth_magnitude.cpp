#include "kth_magnitude.h"

#include <algorithm>

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

// ---- counting ----------------------------------------------------------------------------------

// counts: keys above high, equal to high, equal to low.
template <class K>
MK_CLONES void count(const K* keys, std::int64_t n, K low, K high, K* counts) {
  K above = 0, at_high = 0, at_low = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    above += keys[i] > high;
    at_high += keys[i] == high;
    at_low += keys[i] == low;
  }
  counts[0] = above;
  counts[1] = at_high;
  counts[2] = at_low;
}

// A block as kRows rows of kColumns keys. columns[c] tells whether a key of column c lies in
// [first, first + width): under a narrow bracket most columns hold none and are passed over.
constexpr std::int64_t kRows = 16, kColumns = kBlock / kRows;
template <class K>
MK_CLONES void mark(const K* keys, K first, K width, K* columns) {
  for (std::int64_t c = 0; c < kColumns; ++c) columns[c] = 0;
  for (std::int64_t r = 0; r < kRows; ++r)
    for (std::int64_t c = 0; c < kColumns; ++c)
      columns[c] |= K(keys[r * kColumns + c] - first) < width ? K(1) : K(0);
}

// Adds one block of keys to a bracket.
template <class K>
void count_block(const K* keys, std::int64_t n, Bracket& bracket) {
  const K low = K(bracket.low), high = K(bracket.high);
  BracketCount& total = bracket.count;
  K* stored = static_cast<K*>(bracket.kept);
  K counts[3];
  count(keys, n, low, high, counts);
  total.above += counts[0];
  total.at_high += counts[1];
  total.at_low += low == high ? 0 : counts[2];
  if (high - low < 2) return;

  // Storing is unconditional and the place moves on by 0 or 1: no branch to mispredict.
  std::int64_t inside = total.inside;
  const bool room = inside + n <= bracket.capacity;
  const K first = low + 1, width = high - first;  // strictly inside: key - first < width
  auto keep = [&](const K* from, std::int64_t step, const K* to) {
    for (; from < to; from += step) {
      if (room) stored[inside] = *from;
      inside += K(*from - first) < width;
    }
  };
  if (n < kBlock) {
    keep(keys, 1, keys + n);
  } else {
    K columns[kColumns];
    mark(keys, first, width, columns);
    std::int64_t touched[kColumns], count = 0;
    for (std::int64_t c = 0; c < kColumns; ++c) {
      touched[count] = c;
      count += columns[c] != 0;
    }
    for (std::int64_t i = 0; i < count; ++i) keep(keys + touched[i], kColumns, keys + kBlock);
  }
  total.inside = inside;
}

}  // namespace

void magnitude_keys(const Magnitudes& args, std::int64_t begin, std::int64_t end, void* out) {
  for_key_blocks(args, begin, end, [&](auto* keys, std::int64_t at, std::int64_t n) {
    using K = std::remove_pointer_t<decltype(keys)>;
    std::copy(keys, keys + n, static_cast<K*>(out) + (at - begin));
  });
}

void sample_keys(const Magnitudes& args, std::int64_t total, std::int64_t runs, std::int64_t run,
                 std::int64_t begin, std::int64_t end, void* out) {
  const std::int64_t stratum = total / runs;
  const std::size_t width = args.xs[0].dtype == DType::f64 ? 8 : 4;
  for (std::int64_t r = begin; r < end; ++r) {
    std::uint64_t hash = std::uint64_t(r) * 0x9E3779B97F4A7C15ull;  // one step of splitmix64
    hash = (hash ^ (hash >> 30)) * 0xBF58476D1CE4E5B9ull;
    hash ^= hash >> 27;
    const std::int64_t at = r * stratum + std::int64_t(hash % std::uint64_t(stratum - run + 1));
    magnitude_keys(args, at, at + run, static_cast<char*>(out) + std::size_t(r * run) * width);
  }
}

// Elements over which all Magnitudes take their turn: the base stays in the caches meanwhile.
constexpr std::int64_t kShare = 1 << 14;

void bracket_count(const Magnitudes* args, Bracket* brackets, std::int64_t n, std::int64_t begin,
                   std::int64_t end) {
  for (std::int64_t first = begin; first < end; first += kShare)
    for (std::int64_t i = 0, j; i < n; i = j) {
      for (j = i; j < n && brackets[j].of == brackets[i].of; ++j) {
      }
      for_key_blocks(args[brackets[i].of], first, std::min(end, first + kShare),
                     [&](auto* keys, std::int64_t, std::int64_t m) {
                       for (std::int64_t b = i; b < j; ++b) count_block(keys, m, brackets[b]);
                     });
    }
}

void digit_histogram(const Magnitudes& args, std::int64_t begin, std::int64_t end,
                     std::uint64_t prefix, int shift, std::int64_t* histogram) {
  for_key_blocks(args, begin, end, [&](auto* keys, std::int64_t, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint64_t key = keys[i];
      // Two shifts: the digit may be the topmost, and a shift by the full width is undefined.
      if ((key >> shift >> 16) == prefix) ++histogram[(key >> shift) & 0xffffu];
    }
  });
}

void pattern_histogram(const View& x, std::int64_t begin, std::int64_t end,
                       std::int64_t* histogram) {
  std::uint16_t gathered[kBlock];
  for (std::int64_t at = begin; at < end; at += kBlock) {
    const std::int64_t n = std::min(kBlock, end - at);
    const std::uint16_t* bits = read_block(x, at, n, gathered);
    for (std::int64_t i = 0; i < n; ++i) ++histogram[bits[i] & 0x7fffu];
  }
}

std::int64_t find_key(const Magnitudes& args, std::int64_t begin, std::int64_t end,
                      std::uint64_t key, std::int64_t rank) {
  std::int64_t found = -1;
  for_key_blocks(args, begin, end, [&](auto* keys, std::int64_t at, std::int64_t n) {
    for (std::int64_t i = 0; i < n && found < 0; ++i)
      if (keys[i] == key && rank-- == 0) found = at + i;
  });
  return found;
}

}  // namespace mk
