#include "deltas.h"

#include <algorithm>

namespace mk {
namespace {

template <class T>
MK_CLONES void subtract(const T* x, const T* base, acc_t<T>* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = widen(x[i]) - widen(base[i]);
}

template <class T>
MK_CLONES void copy_widened(const T* x, acc_t<T>* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = widen(x[i]);
}

template <class A>
void any_delta_block(const View& x, const Deltas& from, std::int64_t begin, std::int64_t n,
                     A* out) {
  with_type(x.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if constexpr (std::is_same_v<acc_t<T>, A>) {
      alignas(64) T gathered[kDeltaBlock], gathered_base[kDeltaBlock];
      const T* values = read_block(x, begin, n, gathered);
      if (from.base)
        subtract(values, read_block(*from.base, begin, n, gathered_base), out, n);
      else
        copy_widened(values, out, n);
      if (from.rounded && from.base) round_block(x.dtype, out, n);
    }
  });
}

template <class A>
MK_CLONES void keep_interval(A* v, std::int64_t n, key_t<A> low, key_t<A> width) {
  for (std::int64_t i = 0; i < n; ++i)
    v[i] = masked(v[i], mask_if<A>(key_t<A>(magnitude_bits(v[i]) - low) < width));
}

template <class A>
MK_CLONES void keep_drawn(A* v, const std::uint16_t* draws, std::int64_t n, std::uint32_t limit) {
  for (std::int64_t i = 0; i < n; ++i)
    v[i] = masked(v[i], mask_if<A>(std::uint32_t(draws[i]) < limit));
}

template <class A>
void any_keep_block(const KeepRule& rule, std::int64_t begin, std::int64_t n, A* v) {
  if (rule.kind == Keep::interval) {
    for (std::int64_t at = 0, m; at < n; at += m) {
      m = up_to_cut(rule, begin + at, n - at);
      const Interval kept = interval_at<A>(rule, begin + at);
      keep_interval(v + at, m, key_t<A>(kept.low), key_t<A>(kept.width));
    }
  } else if (is_drawn(rule)) {
    alignas(64) std::uint16_t draws[kDeltaBlock];
    draw_block(rule, begin, n, draws);
    keep_drawn(v, draws, n, draw_limit(rule));
  }
}

// For each byte, 0 where its bit is set, all ones where not.
struct BitTable {
  std::uint16_t dropped[256][8];
  constexpr BitTable() : dropped() {
    for (int byte = 0; byte < 256; ++byte)
      for (int i = 0; i < 8; ++i) dropped[byte][i] = byte >> (7 - i) & 1 ? 0 : 0xffff;
  }
};
constexpr BitTable kBits;

// Elements over which all models take their turn: the base stays in the caches meanwhile.
constexpr std::int64_t kShare = 1 << 14;

constexpr int kLanes = 16;
template <bool kSquare, class A>
MK_CLONES void add_lanes(const A* v, std::int64_t n, double* lanes) {
  double sums[kLanes];
  for (int l = 0; l < kLanes; ++l) sums[l] = lanes[l];
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const double x = double(v[i + l]);
      sums[l] += kSquare ? x * x : __builtin_fabs(x);
    }
  for (int l = 0; i < n; ++i, ++l) {
    const double x = double(v[i]);
    sums[l] += kSquare ? x * x : __builtin_fabs(x);
  }
  for (int l = 0; l < kLanes; ++l) lanes[l] = sums[l];
}

// The sums of |v| and of kept |v| at once. One lane per element: blocks need not be whole.
template <class A, class F>
MK_INLINE void add_kept(const A* v, std::int64_t n, double* all, double* kept, F&& mask) {
  double a[kLanes], k[kLanes];
  for (int l = 0; l < kLanes; ++l) a[l] = all[l], k[l] = kept[l];
  auto add = [&](std::int64_t i, int l) {
    const A size = bit_cast<A>(magnitude_bits(v[i]));
    a[l] += double(size);
    k[l] += double(masked(size, mask(i)));
  };
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) add(i + l, l);
  for (int l = 0; i < n; ++i, ++l) add(i, l);
  for (int l = 0; l < kLanes; ++l) all[l] = a[l], kept[l] = k[l];
}
template <class A>
MK_CLONES void add_interval(const A* v, key_t<A> low, key_t<A> width, std::int64_t n, double* all,
                            double* kept) {
  add_kept(v, n, all, kept, [=](std::int64_t i) {
    return mask_if<A>(key_t<A>(magnitude_bits(v[i]) - low) < width);
  });
}
template <class A>
MK_CLONES void add_drawn(const A* v, const std::uint16_t* draws, std::uint32_t limit,
                         std::int64_t n, double* all, double* kept) {
  add_kept(v, n, all, kept,
           [=](std::int64_t i) { return mask_if<A>(std::uint32_t(draws[i]) < limit); });
}

// The number of kept elements. signs: bit 0 is set where one is positive, bit 1 where negative.
template <class A, class F>
MK_INLINE std::int64_t mark_kept(const A* v, std::int64_t n, key_t<A>* signs, F&& mask) {
  key_t<A> count = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const key_t<A> kept = mask(i);
    count += kept & 1;
    signs[i] |= kept & ((mask_if<A>(v[i] > 0) & 1) | (mask_if<A>(v[i] < 0) & 2));
  }
  return std::int64_t(count);
}
template <class A>
MK_CLONES std::int64_t mark_interval(const A* v, key_t<A> low, key_t<A> width, std::int64_t n,
                                     key_t<A>* signs) {
  return mark_kept(v, n, signs, [=](std::int64_t i) {
    return mask_if<A>(key_t<A>(magnitude_bits(v[i]) - low) < width);
  });
}
template <class A>
MK_CLONES std::int64_t mark_drawn(const A* v, const std::uint16_t* draws, std::uint32_t limit,
                                  std::int64_t n, key_t<A>* signs) {
  return mark_kept(v, n, signs,
                   [=](std::int64_t i) { return mask_if<A>(std::uint32_t(draws[i]) < limit); });
}
template <class K>
MK_CLONES std::int64_t count_both(const K* signs, std::int64_t n) {
  K count = 0;
  for (std::int64_t i = 0; i < n; ++i) count += signs[i] == 3;
  return std::int64_t(count);
}

MK_CLONES void pack(const std::uint8_t* kept, std::int64_t bytes, std::uint8_t* bits) {
  for (std::int64_t q = 0; q < bytes; ++q) {
    std::uint64_t eight;
    std::memcpy(&eight, kept + 8 * q, 8);
    bits[q] = std::uint8_t(eight * 0x8040201008040201ull >> 56);
  }
}

}  // namespace

void delta_block(const View& x, const Deltas& from, std::int64_t begin, std::int64_t n,
                 float* out) {
  any_delta_block(x, from, begin, n, out);
}
void delta_block(const View& x, const Deltas& from, std::int64_t begin, std::int64_t n,
                 double* out) {
  any_delta_block(x, from, begin, n, out);
}

void keep_block(const KeepRule& rule, std::int64_t begin, std::int64_t n, float* v) {
  any_keep_block(rule, begin, n, v);
}
void keep_block(const KeepRule& rule, std::int64_t begin, std::int64_t n, double* v) {
  any_keep_block(rule, begin, n, v);
}

void draw_block(const KeepRule& rule, std::int64_t begin, std::int64_t n, std::uint16_t* draws) {
  constexpr std::int64_t kRoom = kDeltaBlock + (1 + kDrawGroup) * kDraws;
  alignas(64) std::uint16_t whole[kRoom];
  begin += rule.first;
  const std::int64_t first = begin / kDraws, blocks = (begin + n - 1) / kDraws + 1 - first;
  if (rule.kind == Keep::random) {
    const bool in_groups = begin % kDraws == 0 && n % (kDraws * kDrawGroup) == 0;
    philox_draws(rule.key, std::uint64_t(first), blocks, in_groups ? draws : whole);
    if (in_groups) return;
  } else {
    for (std::int64_t q = 0; q < blocks; ++q)
      std::memcpy(whole + q * kDraws, kBits.dropped[rule.bits[first + q]],
                  sizeof(kBits.dropped[0]));
  }
  std::memcpy(draws, whole + begin % kDraws, std::size_t(n) * sizeof(*draws));
}

void pack_bits(const std::uint8_t* kept, std::int64_t n, std::uint8_t* bits) {
  pack(kept, (n + 7) / 8, bits);
}

void LaneSum::add_magnitudes(const float* v, std::int64_t n) { add_lanes<false>(v, n, lanes_); }
void LaneSum::add_magnitudes(const double* v, std::int64_t n) { add_lanes<false>(v, n, lanes_); }
void LaneSum::add_squares(const float* v, std::int64_t n) { add_lanes<true>(v, n, lanes_); }
void LaneSum::add_squares(const double* v, std::int64_t n) { add_lanes<true>(v, n, lanes_); }
double LaneSum::total() const {
  double sum = 0;
  for (double lane : lanes_) sum += lane;
  return sum;
}

void l1_norms(const View* xs, std::int64_t n, const Deltas& from, const KeepRule* keep,
              std::int64_t begin, std::int64_t end, double* sums) {
  with_type(xs[0].dtype, [&](auto* tag) {
    using A = acc_t<std::remove_pointer_t<decltype(tag)>>;
    alignas(64) A v[kDeltaBlock];
    alignas(64) std::uint16_t draws[kDeltaBlock];
    for (std::int64_t first = begin; first < end; first += kShare) {
      const std::int64_t last = std::min(end, first + kShare);
      for (std::int64_t i = 0; i < n; ++i) {
        double all[kLanes] = {}, kept[kLanes] = {};
        for (std::int64_t at = first, m; at < last; at += m) {
          m = up_to_cut(keep[i], at, std::min(kDeltaBlock, last - at));
          delta_block(xs[i], from, at, m, v);
          if (is_drawn(keep[i])) {
            draw_block(keep[i], at, m, draws);
            add_drawn(v, draws, draw_limit(keep[i]), m, all, kept);
          } else {
            const Interval span = interval_at<A>(keep[i], at);
            add_interval(v, key_t<A>(span.low), key_t<A>(span.width), m, all, kept);
          }
        }
        for (int l = 0; l < kLanes; ++l) {
          sums[2 * i] += all[l];
          sums[2 * i + 1] += kept[l];
        }
      }
    }
  });
}

void count_kept(const View* xs, std::int64_t n, const Deltas& from, const KeepRule* keep,
                std::int64_t begin, std::int64_t end, std::int64_t* counts) {
  with_type(xs[0].dtype, [&](auto* tag) {
    using A = acc_t<std::remove_pointer_t<decltype(tag)>>;
    alignas(64) A v[kDeltaBlock];
    alignas(64) key_t<A> signs[kDeltaBlock];
    alignas(64) std::uint16_t draws[kDeltaBlock];
    for (std::int64_t first = begin; first < end; first += kDeltaBlock) {
      const std::int64_t last = std::min(end, first + kDeltaBlock);
      std::fill(signs, signs + kDeltaBlock, key_t<A>(0));
      for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t at = first, m; at < last; at += m) {
          m = up_to_cut(keep[i], at, last - at);
          delta_block(xs[i], from, at, m, v);
          key_t<A>* marked = signs + (at - first);
          if (is_drawn(keep[i])) {
            draw_block(keep[i], at, m, draws);
            counts[i] += mark_drawn(v, draws, draw_limit(keep[i]), m, marked);
          } else {
            const Interval span = interval_at<A>(keep[i], at);
            counts[i] += mark_interval(v, key_t<A>(span.low), key_t<A>(span.width), m, marked);
          }
        }
      counts[n] += count_both(signs, last - first);
    }
  });
}

}  // namespace mk
