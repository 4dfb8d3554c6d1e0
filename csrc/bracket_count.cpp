#include "magnitude_keys.h"

namespace mk {
namespace {

// 64 bytes: a register of AVX-512 or two of AVX2.
template <class K>
struct Wide;
template <>
struct Wide<std::uint32_t> {
  using Keys = std::uint32_t __attribute__((vector_size(64)));
  using Values = float __attribute__((vector_size(64)));
  using Bytes = std::uint8_t __attribute__((vector_size(16)));
};
template <>
struct Wide<std::uint64_t> {
  using Keys = std::uint64_t __attribute__((vector_size(64)));
  using Values = double __attribute__((vector_size(64)));
  using Bytes = std::uint8_t __attribute__((vector_size(8)));
};
template <class K>
constexpr std::int64_t kWide = 64 / sizeof(K);

// Where a block takes its keys from: load(from, i, keys) gives those of kWide elements from i on.
// The order within a block does not matter, so two bfloat16 are widened from each 32 bits in place.
template <class T>
struct FromTensors {
  using K = key_t<T>;
  const T *x, *base;
  static constexpr bool kStored = false;
  MK_INLINE void load(const FromTensors& from, std::int64_t i, typename Wide<K>::Keys* keys) {
    __builtin_prefetch(from.x + i + kBlock);  // of the base, an earlier x had most
    typename Wide<K>::Values x, b;
    widen_some(from.x, i, &x);
    widen_some(from.base, i, &b);
    x -= b;
    std::memcpy(keys, &x, sizeof(*keys));
    *keys &= ~K(0) >> 1;
    const K nan = sizeof(K) == 8 ? K(kNanKey64) : K(kNanKey32);
    *keys = *keys < nan ? *keys : typename Wide<K>::Keys{} + nan;
  }

 private:
  template <class A>
  MK_INLINE void widen_some(const A* x, std::int64_t i, typename Wide<K>::Values* v) {
    std::memcpy(v, x + i, sizeof(*v));
  }
  MK_INLINE void widen_some(const bf16* x, std::int64_t i, Wide<std::uint32_t>::Values* v) {
    const std::int64_t odd = i / kWide<K> % 2;
    Wide<std::uint32_t>::Keys bits;
    std::memcpy(&bits, x + i - odd * kWide<K>, sizeof(bits));
    bits = odd ? bits & 0xffff0000u : bits << 16;
    std::memcpy(v, &bits, sizeof(*v));
  }
};
template <class K>
struct FromKeys {
  const K* keys;
  static constexpr bool kStored = true;
  MK_INLINE void load(const FromKeys& from, std::int64_t i, typename Wide<K>::Keys* keys) {
    std::memcpy(keys, from.keys + i, sizeof(*keys));
  }
};

// A block as rows of kColumns keys: under a narrow bracket most columns hold no key inside it and
// are passed over when keys are stored.
template <class K>
constexpr std::int64_t kColumns = 8 * kWide<K>;

// Counts of the keys of a whole block above high, equal to high, equal to low; inside[c] is not 0
// if a key of column c lies strictly between. The keys go to `keys`.
template <class K, class From>
MK_CLONES void count_keys(const From& source, K low, K high, K* keys, K* counts,
                          std::uint8_t* inside) {
  using Keys = typename Wide<K>::Keys;
  using Bytes = typename Wide<K>::Bytes;
  const From from = source;
  const K first = low + 1, width = high - low < 2 ? 0 : high - first;
  Keys above{}, at_high{}, at_low{}, marks[8] = {};
  for (std::int64_t row = 0; row < kBlock; row += kColumns<K>) {
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) {
      Keys v;
      From::load(from, row + c * kWide<K>, &v);
      if (!From::kStored) std::memcpy(keys + row + c * kWide<K>, &v, sizeof(v));
      above = v > high ? above + 1 : above;
      at_high = v == high ? at_high + 1 : at_high;
      at_low = v == low ? at_low + 1 : at_low;
      marks[c] = v - first < width ? Keys{} + 1 : marks[c];
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) {
    const Bytes bytes = __builtin_convertvector(marks[c], Bytes);
    std::memcpy(inside + c * kWide<K>, &bytes, sizeof(bytes));
  }
  counts[0] = counts[1] = counts[2] = 0;
  for (std::int64_t l = 0; l < kWide<K>; ++l) {
    counts[0] += above[l];
    counts[1] += at_high[l];
    counts[2] += at_low[l];
  }
}

template <class K>
void add_counts(Bracket& bracket, const K* counts) {
  bracket.count.above += std::int64_t(counts[0]);
  bracket.count.at_high += std::int64_t(counts[1]);
  bracket.count.at_low += bracket.low == bracket.high ? 0 : std::int64_t(counts[2]);
}

// Stores the keys strictly inside the bracket, `step` of them apart. The place moves on by 0 or 1:
// no branch to mispredict. Returns the next place.
template <std::int64_t kCount, class K>
MK_INLINE std::int64_t store_inside(const K* keys, std::int64_t step, K first, K width, K* to,
                                    std::int64_t at, bool room) {
#pragma GCC unroll 16
  for (std::int64_t i = 0; i < kCount; ++i) {
    if (room) to[at] = keys[i * step];
    at += K(keys[i * step] - first) < width;
  }
  return at;
}

// The bytes 0 or 1 of 64 columns as the bits of one number.
MK_INLINE std::uint64_t bits_of(const std::uint8_t* bytes) {
  std::uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    std::uint64_t eight;
    std::memcpy(&eight, bytes + 8 * i, 8);
    bits |= (eight * 0x0102040810204080ull >> 56) << (8 * i);
  }
  return bits;
}

// Adds a whole block to a bracket.
template <class K, class From>
void count_block(const From& from, K* keys, Bracket& bracket) {
  K counts[3];
  alignas(64) std::uint8_t inside[kColumns<K>];
  const K low = K(bracket.low), high = K(bracket.high);
  count_keys(from, low, high, keys, counts, inside);
  add_counts(bracket, counts);
  if (high - low < 2) return;
  K* to = static_cast<K*>(bracket.kept);
  std::int64_t at = bracket.count.inside;
  const bool room = at + kBlock <= bracket.capacity;
  for (std::int64_t c = 0; c < kColumns<K>; c += 64)
    for (std::uint64_t bits = bits_of(inside + c); bits; bits &= bits - 1)
      at = store_inside<kBlock / kColumns<K>>(keys + c + __builtin_ctzll(bits), kColumns<K>,
                                              K(low + 1), K(high - low - 1), to, at, room);
  bracket.count.inside = at;
}

// Adds fewer keys.
template <class K>
void count_some(const K* keys, std::int64_t n, Bracket& bracket) {
  const K low = K(bracket.low), high = K(bracket.high);
  K counts[3] = {0, 0, 0};
  for (std::int64_t i = 0; i < n; ++i) {
    counts[0] += keys[i] > high;
    counts[1] += keys[i] == high;
    counts[2] += keys[i] == low;
  }
  add_counts(bracket, counts);
  if (high - low < 2) return;
  const bool room = bracket.count.inside + n <= bracket.capacity;
  for (std::int64_t i = 0; i < n; ++i)
    bracket.count.inside =
        store_inside<1>(keys + i, 1, K(low + 1), K(high - low - 1), static_cast<K*>(bracket.kept),
                        bracket.count.inside, room);
}

// Adds elements [begin, end) to brackets of one Magnitudes.
template <class T>
void count_range(const Magnitudes& args, std::int64_t begin, std::int64_t end, Bracket* brackets,
                 std::int64_t n) {
  using K = key_t<T>;
  constexpr bool kDirect = !std::is_same_v<T, f16>;  // widened in more steps, better by blocks
  const bool direct = kDirect && args.from.base && !args.variance && !args.from.rounded;
  alignas(64) T gathered[2][kBlock];
  alignas(64) K keys[kBlock];
  for (std::int64_t at = begin, m; at < end; at += m) {
    m = std::min(kBlock, end - at);
    std::int64_t b = 0;
    if constexpr (kDirect)
      if (direct && m == kBlock) {
        const FromTensors<T> from{read_block(args.xs[0], at, m, gathered[0]),
                                  read_block(*args.from.base, at, m, gathered[1])};
        count_block(from, keys, brackets[b++]);
      }
    if (b == 0) key_block<T>(args, at, m, keys);
    for (; b < n; ++b)
      if (m == kBlock)
        count_block(FromKeys<K>{keys}, keys, brackets[b]);
      else
        count_some(keys, m, brackets[b]);
  }
}

}  // namespace

// Elements over which all Magnitudes take their turn: the base stays in the caches meanwhile.
constexpr std::int64_t kShare = 1 << 14;

void bracket_count(const Magnitudes* args, Bracket* brackets, std::int64_t n, std::int64_t begin,
                   std::int64_t end) {
  for (std::int64_t first = begin; first < end; first += kShare)
    for (std::int64_t i = 0, j; i < n; i = j) {
      for (j = i; j < n && brackets[j].of == brackets[i].of; ++j) {
      }
      const Magnitudes& source = args[brackets[i].of];
      with_type(source.xs[0].dtype, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        count_range<T>(source, first, std::min(end, first + kShare), brackets + i, j - i);
      });
    }
}

}  // namespace mk
