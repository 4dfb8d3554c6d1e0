// Blocks of task vectors d = x - base, and what a rule keeps of them: shared by every kernel that
// trims, counts, draws or merges.
#pragma once

#include "common.h"
#include "philox.h"

namespace mk {

constexpr std::int64_t kDeltaBlock = 512;  // blocks of more elements are not taken

// Where task vectors come from. `rounded`: each difference is rounded to the type of x, as tools
// do that compute in the type of the tensor.
struct Deltas {
  const View* base;  // nullptr: zero
  bool rounded;
};

// out[i] = x - base of element begin + i, i < n; in the accumulator of x (double for f64).
void delta_block(const View& x, const Deltas& from, std::int64_t begin, std::int64_t n, float* out);
void delta_block(const View& x, const Deltas& from, std::int64_t begin, std::int64_t n,
                 double* out);

enum class Keep : int { all = 0, interval = 1, random = 2, bits = 3 };

// What survives of one task vector.
// interval: low <= key of |d|, key == low only at flat indices below low_cut; and not above high:
//   key < high, or key == high from flat index high_cut on (the largest go, lowest index first).
// random: the 16-bit Philox draw of element `first` + e < limit (limit 65536 keeps all).
// bits: bit 7 - e % 8 of byte e / 8 is set (numpy.packbits).
struct KeepRule {
  Keep kind = Keep::all;
  std::uint64_t low = 0;
  std::int64_t low_cut = 0;
  std::uint64_t high = 0;
  std::int64_t high_cut = 0;
  PhiloxKey key = {0, 0};
  std::uint32_t limit = 0;
  std::int64_t first = 0;
  const std::uint8_t* bits = nullptr;
};

// An interval rule within a block that no cut divides: kept if the bits of |d| - low < width. Here
// NaN are many numbers, all from the one NaN key of the rule on; past it there are none.
struct Interval {
  std::uint64_t low, width;
};
template <class A>
MK_INLINE Interval interval_at(const KeepRule& rule, std::int64_t begin) {
  constexpr std::uint64_t kPast = std::uint64_t(1) << (8 * sizeof(A) - 1);
  constexpr std::uint64_t kNan = sizeof(A) == 8 ? kNanKey64 : kNanKey32;
  if (rule.kind != Keep::interval) return {0, kPast};
  std::uint64_t low = rule.low + (begin >= rule.low_cut);
  std::uint64_t high = rule.high + (begin >= rule.high_cut);
  low = low > kNan ? kPast : low;
  high = high > kNan ? kPast : high;
  return {low, high > low ? high - low : 0};
}
// The largest n such that no cut of the rule lies strictly inside [begin, begin + n).
MK_INLINE std::int64_t up_to_cut(const KeepRule& rule, std::int64_t begin, std::int64_t n) {
  if (rule.kind != Keep::interval) return n;
  if (rule.low_cut > begin && rule.low_cut - begin < n) n = rule.low_cut - begin;
  if (rule.high_cut > begin && rule.high_cut - begin < n) n = rule.high_cut - begin;
  return n;
}

// Whether a rule is applied by draws: element begin + i is kept if draws[i] < draw_limit(rule).
MK_INLINE bool is_drawn(const KeepRule& rule) {
  return rule.kind == Keep::bits || (rule.kind == Keep::random && rule.limit < 65536);
}
void draw_block(const KeepRule& rule, std::int64_t begin, std::int64_t n, std::uint16_t* draws);
MK_INLINE std::uint32_t draw_limit(const KeepRule& rule) {
  return rule.kind == Keep::random ? rule.limit : 1u;
}

// Zeroes what the rule does not keep among elements [begin, begin + n).
void keep_block(const KeepRule& rule, std::int64_t begin, std::int64_t n, float* v);
void keep_block(const KeepRule& rule, std::int64_t begin, std::int64_t n, double* v);

// Masks are integers rather than ?: on floats: compilers keep such loops in vector registers.
template <class A>
MK_INLINE A masked(A value, key_t<A> mask) {
  return bit_cast<A>(key_t<A>(bit_cast<key_t<A>>(value) & mask));
}
template <class A>
MK_INLINE key_t<A> mask_if(bool condition) {
  return condition ? ~key_t<A>(0) : key_t<A>(0);
}

// Eight bytes of 0 or 1 become the bits of one, the first the highest; reads up to 7 bytes past n.
void pack_bits(const std::uint8_t* kept, std::int64_t n, std::uint8_t* bits);

// A sum of |v| or of v^2 in double: 16 interleaved sums vectorise without reordering any of them.
class LaneSum {
 public:
  void add_magnitudes(const float* v, std::int64_t n);
  void add_magnitudes(const double* v, std::int64_t n);
  void add_squares(const float* v, std::int64_t n);
  void add_squares(const double* v, std::int64_t n);
  double total() const;

 private:
  double lanes_[16] = {};
};

// sums[2 i] += sum |d_i|, sums[2 i + 1] += sum |d_i| over kept elements, i < n.
void l1_norms(const View* xs, std::int64_t n, const Deltas& from, const KeepRule* keep,
              std::int64_t begin, std::int64_t end, double* sums);

// counts[i] += kept elements of d_i, i < n; counts[n] += elements where the kept d_i have both
// signs. Zeros and NaN have none.
void count_kept(const View* xs, std::int64_t n, const Deltas& from, const KeepRule* keep,
                std::int64_t begin, std::int64_t end, std::int64_t* counts);

}  // namespace mk
