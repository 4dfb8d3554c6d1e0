// A random mask whose probability depends on the rank of |x - base| within its row (MAGPRUNE of
// DELLA, 2406.11617): an element is kept if its 16-bit Philox draw is below limits[rank].
//
// Rank 0 is the smallest magnitude of the row; equal magnitudes rank in index order, NaN last. A
// row runs along the middle axis of x seen as [units, length, inner].
#pragma once

#include "deltas.h"

namespace mk {

struct RankMask {
  View x;
  Deltas from;
  std::int64_t units, length, inner;
  const std::uint32_t* limits;  // [length]
  PhiloxKey key;
  std::int64_t first;  // counter of the draw of element 0
  std::uint8_t* bits;  // of all elements, as numpy.packbits
};

constexpr std::int64_t kMaskUnits = 8;  // whose elements together fill whole bytes

// Bytes that rank_mask needs for itself, per calling thread.
std::int64_t rank_mask_scratch(const RankMask& args);

// Units [begin, end), begin a multiple of kMaskUnits. sums[0] += sum |d|, sums[1] += sum |d| over
// kept elements, in double, in order within 16 interleaved partial sums.
void rank_mask(const RankMask& args, std::int64_t begin, std::int64_t end, void* scratch,
               double* sums);

}  // namespace mk
