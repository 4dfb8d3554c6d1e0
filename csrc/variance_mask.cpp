#include "variance_mask.h"

#include <algorithm>

namespace mk {
namespace {

template <class K>
MK_CLONES void keep_high(const K* keys, std::int64_t n, K threshold, std::uint8_t* kept) {
  for (std::int64_t i = 0; i < n; ++i) kept[i] = keys[i] >= threshold;
}

template <class A>
MK_CLONES void drop(A* v, const std::uint8_t* kept, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) v[i] = masked(v[i], mask_if<A>(kept[i] != 0));
}

// Elements over which all models take their turn: the base stays in the caches meanwhile.
constexpr std::int64_t kShare = 1 << 14;

template <class A>
void run(const VarianceMask& args, std::int64_t begin, std::int64_t end, double* squares) {
  const Magnitudes& source = args.source;
  alignas(64) A d[kDeltaBlock];
  alignas(64) key_t<A> keys[kDeltaBlock];
  alignas(64) std::uint8_t kept[kShare + 8];
  for (std::int64_t first = begin; first < end; first += kShare) {
    const std::int64_t share = std::min(kShare, end - first);
    if (!args.all) {
      for (std::int64_t i = 0; i < share; i += kDeltaBlock) {
        const std::int64_t m = std::min(kDeltaBlock, share - i);
        magnitude_keys(source, first + i, first + i + m, keys);
        const std::int64_t ties = std::clamp<std::int64_t>(args.cut - first - i, 0, m);
        keep_high(keys, ties, key_t<A>(args.threshold), kept + i);
        keep_high(keys + ties, m - ties, key_t<A>(args.threshold + 1), kept + i + ties);
      }
      std::memset(kept + share, 0, 8);
      pack_bits(kept, share, args.bits + first / 8);
    }
    for (std::int64_t j = 0; j < source.n; ++j) {
      LaneSum sum;
      for (std::int64_t i = 0; i < share; i += kDeltaBlock) {
        const std::int64_t m = std::min(kDeltaBlock, share - i);
        delta_block(source.xs[j], source.from, first + i, m, d);
        if (!args.all) drop(d, kept + i, m);
        sum.add_squares(d, m);
      }
      squares[j] += sum.total();
    }
  }
}

}  // namespace

void variance_mask(const VarianceMask& args, std::int64_t begin, std::int64_t end,
                   double* squares) {
  if (args.source.xs[0].dtype == DType::f64)
    run<double>(args, begin, end, squares);
  else
    run<float>(args, begin, end, squares);
}

}  // namespace mk
