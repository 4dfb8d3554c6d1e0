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

// Calls f(keys, first element, count) for each block of keys.
template <class F>
void for_key_blocks(const Magnitudes& args, std::int64_t begin, std::int64_t end, F&& f) {
  with_type(args.x.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    alignas(64) T gathered[kBlock], gathered_base[kBlock];
    alignas(64) key_t<T> keys[kBlock];
    for (std::int64_t at = begin; at < end; at += kBlock) {
      const std::int64_t n = std::min(kBlock, end - at);
      const T* base = args.base ? read_block(*args.base, at, n, gathered_base) : nullptr;
      to_keys(read_block(args.x, at, n, gathered), base, n, keys);
      f(keys, at, n);
    }
  });
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
  const std::size_t width = args.x.dtype == DType::f64 ? 8 : 4;
  for (std::int64_t r = begin; r < end; ++r) {
    std::uint64_t hash = std::uint64_t(r) * 0x9E3779B97F4A7C15ull;  // one step of splitmix64
    hash = (hash ^ (hash >> 30)) * 0xBF58476D1CE4E5B9ull;
    hash ^= hash >> 27;
    const std::int64_t at = r * stratum + std::int64_t(hash % std::uint64_t(stratum - run + 1));
    magnitude_keys(args, at, at + run, static_cast<char*>(out) + std::size_t(r * run) * width);
  }
}

BracketCount bracket_count(const Magnitudes& args, std::int64_t begin, std::int64_t end,
                           std::uint64_t low, std::uint64_t high, void* kept,
                           std::int64_t capacity) {
  BracketCount total{};
  for_key_blocks(args, begin, end, [&](auto* keys, std::int64_t, std::int64_t n) {
    using K = std::remove_pointer_t<decltype(keys)>;
    K* stored = static_cast<K*>(kept);
    K counts[3];
    count(keys, n, K(low), K(high), counts);
    total.above += counts[0];
    total.at_high += counts[1];
    total.at_low += low == high ? 0 : counts[2];
    if (high - low < 2) return;

    // Storing is unconditional and the place moves on by 0 or 1: no branch to mispredict.
    std::int64_t inside = total.inside;
    const bool room = inside + n <= capacity;
    const K first = K(low) + 1, width = K(high) - first;  // strictly inside: key - first < width
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
  });
  return total;
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
