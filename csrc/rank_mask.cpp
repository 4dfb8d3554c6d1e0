#include "rank_mask.h"

#include <algorithm>

namespace mk {
namespace {

template <class K>
struct Item {
  K key;
  std::uint32_t index;
  bool operator<(const Item& other) const {
    return key < other.key || (key == other.key && index < other.index);
  }
};

constexpr std::int64_t kBins = 4096;
constexpr std::int64_t kInsertion = 24;  // items up to which moving them one by one is fastest

template <class A>
struct Scratch {
  A* values;                 // [kMaskUnits * length * inner], zeroed where dropped in the end
  std::uint16_t* draws;      // the same
  std::uint8_t* kept;        // the same
  key_t<A>* keys;            // [length]
  std::uint16_t* bins;       // [length]
  std::uint32_t* undecided;  // [length]
  std::uint32_t* places;     // [length]
  Item<key_t<A>>* ordered;   // [length]
};

std::int64_t padded(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class A>
std::int64_t lay_out(const RankMask& args, char* at, Scratch<A>* s) {
  const std::int64_t many = std::min(args.units, kMaskUnits) * args.length * args.inner;
  char* const start = at;
  auto take = [&](auto*& pointer, std::int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
    at += padded(count * std::int64_t(sizeof(*pointer)));
  };
  take(s->values, many);
  take(s->draws, many);
  take(s->kept, many + 8);
  take(s->keys, args.length);
  take(s->bins, args.length);
  take(s->undecided, args.length);
  take(s->places, args.length);
  take(s->ordered, args.length);
  return at - start;
}

template <class A>
MK_CLONES void to_keys(const A* values, std::int64_t step, key_t<A>* keys, std::int64_t n) {
  if (step == 1)
    for (std::int64_t i = 0; i < n; ++i) keys[i] = magnitude_key(values[i]);
  else
    for (std::int64_t i = 0; i < n; ++i) keys[i] = magnitude_key(values[i * step]);
}

template <class K>
MK_CLONES void bounds(const K* keys, std::int64_t n, K* least, K* most) {
  K low = keys[0], high = keys[0];
  for (std::int64_t i = 0; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  *least = low, *most = high;
}

// Bin 0: below floor; then steps of 2^shift.
template <class K>
MK_CLONES void to_bins(const K* keys, std::int64_t n, K floor, int shift, std::uint16_t* bins) {
  for (std::int64_t i = 0; i < n; ++i) {
    const K bin = ((keys[i] - floor) >> shift) + 1;
    bins[i] = std::uint16_t(keys[i] < floor ? 0 : bin);
  }
}

// Counts of items per bin become the places of their first.
void to_starts(std::uint32_t* counts, std::int64_t bins) {
  std::uint32_t start = 0;
  for (std::int64_t b = 0; b < bins; ++b) {
    const std::uint32_t size = counts[b];
    counts[b] = start;
    start += size;
  }
}

// Items whose bins are in order already: only neighbours of one bin change places.
template <class K>
void sort_within_bins(Item<K>* items, std::int64_t n, const std::uint32_t* ends,
                      std::int64_t bins) {
  std::int64_t begin = 0;
  for (std::int64_t b = 0; b < bins; begin = ends[b++]) {
    const std::int64_t end = ends[b];
    if (end - begin > kInsertion && !std::is_sorted(items + begin, items + end))
      std::sort(items + begin, items + end);
  }
  for (std::int64_t i = 1; i < n; ++i) {
    const Item<K> item = items[i];
    std::int64_t j = i;
    for (; j > 0 && item.key < items[j - 1].key; --j) items[j] = items[j - 1];
    items[j] = item;
  }
}

// Keys in bins of their leading bits: the octaves below the largest magnitude get one for every
// four elements, so most hold few and their starts are soon added up.
struct Bins {
  std::int64_t count;
  std::uint32_t starts[kBins + 3];
};
template <class K>
void fill(const K* keys, std::int64_t n, K least, K most, std::uint16_t* bin_of, Bins& bins) {
  constexpr K kOctaves = K(8) << (sizeof(K) == 8 ? 52 : 23);
  const K floor = most > kOctaves ? std::max(least, K(most - kOctaves)) : least;
  std::int64_t wanted = 64;
  while (4 * wanted < n && wanted < kBins) wanted *= 2;
  int shift = 0;
  while (K(most - floor) >> shift > K(wanted)) ++shift;
  to_bins(keys, n, floor, shift, bin_of);
  bins.count = std::int64_t(K(most - floor) >> shift) + 2;
  std::fill_n(bins.starts, bins.count, 0u);
  for (std::int64_t i = 0; i < n; ++i) ++bins.starts[bin_of[i]];
}

// How many of n keys are smaller, and how many of the first m are equal.
template <class K>
MK_CLONES std::int64_t smaller(const K* keys, std::int64_t n, K key, std::int64_t m) {
  K below = 0, same = 0;
  for (std::int64_t j = 0; j < n; ++j) below += keys[j] < key;
  for (std::int64_t j = 0; j < m; ++j) same += keys[j] == key;
  return std::int64_t(below + same);
}

// f(i, rank) for the undecided, with the keys of each bin next to each other in index order.
template <class A, class F>
void rank_by_bin(const Scratch<A>& s, const Bins& bins, std::int64_t n, std::int64_t count, F&& f) {
  using K = key_t<A>;
  K* laid_out = reinterpret_cast<K*>(s.ordered);
  std::uint32_t next[kBins + 3];
  std::copy_n(bins.starts, bins.count, next);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t place = next[s.bins[i]]++;
    s.places[i] = place;
    laid_out[place] = s.keys[i];
  }
  for (std::int64_t u = 0; u < count; ++u) {
    const std::int64_t i = s.undecided[u];
    const std::int64_t start = bins.starts[s.bins[i]], end = bins.starts[s.bins[i] + 1];
    f(i, start + smaller(laid_out + start, end - start, s.keys[i], s.places[i] - start));
  }
}

// What the smallest chance of all decides: kept[i] of draws below it.
MK_CLONES void keep_below(const std::uint16_t* draws, std::uint32_t limit, std::uint8_t* kept,
                          std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) kept[i] = std::uint32_t(draws[i]) < limit;
}

constexpr std::int64_t kOneByOne = 16;  // undecided up to which each is ranked among the whole row
constexpr std::int64_t kSearch = 32;    // keys read to rank more of them, per element of the row

// Most draws are decided by the smallest and the largest limit of the row, most others by the bin
// alone: below the limit of its first rank, or not below that of its last. For the few between,
// keys are laid out by bin and those of the bin counted; a sort ranks them if that were too many.
template <class A>
void mask_row(const RankMask& args, const Scratch<A>& s, std::int64_t at) {
  using K = key_t<A>;
  const std::int64_t n = args.length, step = args.inner;
  const std::uint16_t* draws = s.draws + at;
  std::uint8_t* kept = s.kept + at;
  const std::uint32_t* limits = args.limits;
  K least, most;
  to_keys(s.values + at, step, s.keys, n);
  bounds(s.keys, n, &least, &most);
  if (least == most) {
    for (std::int64_t i = 0; i < n; ++i) kept[i * step] = draws[i * step] < limits[i];
    return;
  }
  Bins bins;
  fill(s.keys, n, least, most, s.bins, bins);
  to_starts(bins.starts, bins.count);
  bins.starts[bins.count] = std::uint32_t(n);

  const std::uint32_t lowest = limits[0], span = limits[n - 1] - lowest;
  if (step == 1)
    keep_below(draws, lowest, kept, n);
  else
    for (std::int64_t i = 0; i < n; ++i) kept[i * step] = draws[i * step] < lowest;
  std::uint32_t* undecided = s.undecided;
  std::int64_t open = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    undecided[open] = std::uint32_t(i);
    open += std::uint32_t(draws[i * step] - lowest) < span;
  }
  std::int64_t count = 0, reads = 0;
  const std::uint32_t* starts = bins.starts;
  for (std::int64_t u = 0; u < open; ++u) {
    const std::uint32_t i = undecided[u], draw = draws[i * step], bin = s.bins[i];
    const std::uint32_t first = limits[starts[bin]], last = limits[starts[bin + 1] - 1];
    kept[i * step] = draw < first;
    undecided[count] = i;
    const bool between = (draw >= first) & (draw < last);
    count += between;
    reads += between ? starts[bin + 1] - starts[bin] : 0;
  }
  const auto decide = [&](std::int64_t i, std::int64_t rank) {
    kept[i * step] = draws[i * step] < limits[rank];
  };
  if (count <= kOneByOne) {
    for (std::int64_t u = 0; u < count; ++u)
      decide(undecided[u], smaller(s.keys, n, s.keys[undecided[u]], undecided[u]));
    return;
  }
  if (reads <= kSearch * n) return rank_by_bin(s, bins, n, count, decide);
  for (std::int64_t i = 0; i < n; ++i)
    s.ordered[bins.starts[s.bins[i]]++] = {s.keys[i], std::uint32_t(i)};
  sort_within_bins(s.ordered, n, bins.starts, bins.count);
  for (std::int64_t rank = 0; rank < n; ++rank) decide(s.ordered[rank].index, rank);
}

template <class A>
MK_CLONES void drop(A* v, const std::uint8_t* kept, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) v[i] = masked(v[i], mask_if<A>(kept[i] != 0));
}

template <class T>
void run(const RankMask& args, std::int64_t begin, std::int64_t end, void* scratch, double* sums) {
  using A = acc_t<T>;
  Scratch<A> s;
  lay_out(args, static_cast<char*>(scratch), &s);
  const std::int64_t unit = args.length * args.inner;
  KeepRule draws{Keep::random};
  draws.key = args.key;
  LaneSum all, kept;
  for (std::int64_t at = begin; at < end; at += kMaskUnits) {
    const std::int64_t n = std::min(kMaskUnits, end - at) * unit;
    for (std::int64_t i = 0; i < n; i += kDeltaBlock) {
      const std::int64_t m = std::min(kDeltaBlock, n - i);
      delta_block(args.x, args.from, at * unit + i, m, s.values + i);
      draw_block(draws, args.first + at * unit + i, m, s.draws + i);
    }
    all.add_magnitudes(s.values, n);
    for (std::int64_t u = 0; u < n; u += unit)
      for (std::int64_t k = 0; k < args.inner; ++k) mask_row(args, s, u + k);
    std::memset(s.kept + n, 0, 8);
    pack_bits(s.kept, n, args.bits + at * unit / 8);
    drop(s.values, s.kept, n);
    kept.add_magnitudes(s.values, n);
  }
  sums[0] += all.total();
  sums[1] += kept.total();
}

}  // namespace

std::int64_t rank_mask_scratch(const RankMask& args) {
  Scratch<float> s;
  Scratch<double> d;
  return args.x.dtype == DType::f64 ? lay_out(args, nullptr, &d) : lay_out(args, nullptr, &s);
}

void rank_mask(const RankMask& args, std::int64_t begin, std::int64_t end, void* scratch,
               double* sums) {
  with_type(args.x.dtype, [&](auto* tag) {
    run<std::remove_pointer_t<decltype(tag)>>(args, begin, end, scratch, sums);
  });
}

}  // namespace mk
