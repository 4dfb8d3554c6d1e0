#include "kth_magnitude.h"

#include "magnitude_keys.h"

namespace mk {
namespace {

// The topmost digit of every key. Neighbours often have the same one: each waits for the last
// unless they go to histograms of their own.
template <class K>
void count_digits(const K* keys, std::int64_t n, int shift, int lanes, std::int64_t* histogram) {
  constexpr int kLanes = 4;
  std::int64_t i = 0;
  if (lanes == kLanes)
    for (; i + kLanes <= n; i += kLanes)
      for (int l = 0; l < kLanes; ++l) ++histogram[(l << 16) + (keys[i + l] >> shift)];
  for (; i < n; ++i) ++histogram[keys[i] >> shift];
}

template <class K>
MK_CLONES bool any_matches(const K* keys, std::int64_t n, K prefix, int shift) {
  K found = 0;
  for (std::int64_t i = 0; i < n; ++i) found |= K(keys[i] >> shift) == prefix;
  return found != 0;
}

// Few keys match, as a rule: groups without one are passed over in vector registers.
template <class K>
void count_matching(const K* keys, std::int64_t n, K prefix, int shift, std::int64_t* histogram) {
  constexpr std::int64_t kGroup = 64;
  for (std::int64_t at = 0; at < n; at += kGroup) {
    const std::int64_t end = std::min(n, at + kGroup);
    if (!any_matches(keys + at, end - at, prefix, shift + 16)) continue;
    K found[kGroup];
    int count = 0;  // no branch on a key: it would be mispredicted
    for (std::int64_t i = at; i < end; ++i) {
      found[count] = keys[i];
      count += K(keys[i] >> (shift + 16)) == prefix;
    }
    for (int i = 0; i < count; ++i) ++histogram[(found[i] >> shift) & 0xffffu];
  }
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
  constexpr std::int64_t kAhead = 16;  // runs asked for before their turn: each lies elsewhere
  const std::int64_t stratum = total / runs;
  const std::size_t width = args.xs[0].dtype == DType::f64 ? 8 : 4;
  const auto place = [&](std::int64_t r) {
    std::uint64_t hash = std::uint64_t(r) * 0x9E3779B97F4A7C15ull;  // one step of splitmix64
    hash = (hash ^ (hash >> 30)) * 0xBF58476D1CE4E5B9ull;
    hash ^= hash >> 27;
    return r * stratum + std::int64_t(hash % std::uint64_t(stratum - run + 1));
  };
  with_type(args.xs[0].dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for (std::int64_t r = begin; r < end; ++r) {
      if (r + kAhead < end) {
        const std::int64_t later = place(r + kAhead);
        for (std::int64_t i = 0; i < args.n; ++i) prefetch_block<T>(args.xs[i], later, run);
        if (args.from.base) prefetch_block<T>(*args.from.base, later, run);
      }
      const std::int64_t at = place(r);
      magnitude_keys(args, at, at + run, static_cast<char*>(out) + std::size_t(r * run) * width);
    }
  });
}

void digit_histogram(const Magnitudes& args, std::int64_t begin, std::int64_t end,
                     std::uint64_t prefix, int shift, int lanes, std::int64_t* histogram) {
  const bool topmost = shift + 16 == (args.xs[0].dtype == DType::f64 ? 64 : 32);
  for_key_blocks(args, begin, end, [&](auto* keys, std::int64_t, std::int64_t n) {
    using K = std::remove_pointer_t<decltype(keys)>;
    if (topmost)
      count_digits(keys, n, shift, lanes, histogram);
    else
      count_matching(keys, n, K(prefix), shift, histogram);
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
