// The mask of the elements whose variance over models ranks high, and what each model keeps by it:
// element e is kept if key(variance) > threshold, or == threshold and e < cut.
#pragma once

#include "kth_magnitude.h"

namespace mk {

struct VarianceMask {
  Magnitudes source;  // variance
  bool all;           // keep everything: no threshold
  std::uint64_t threshold;
  std::int64_t cut;
  std::uint8_t* bits;  // as numpy.packbits; not written if `all`
};

// begin a multiple of 8. squares[i] += sum of d_i^2 over kept elements, in double.
void variance_mask(const VarianceMask& args, std::int64_t begin, std::int64_t end, double* squares);

}  // namespace mk
