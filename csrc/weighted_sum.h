// out = (sum_i w_i x_i) / divisor, elementwise, over elements [begin, end).
//
// Arithmetic: accumulator sum_t; w_0 x_0, then + w_i x_i in input order, each product and each sum
// rounded; then the division unless divisor is 1; one rounding at the store.
#pragma once

#include "common.h"

namespace mk {

struct WeightedSum {
  View out;
  const View* xs;         // n views of one dtype and shape
  const double* weights;  // rounded to the accumulator
  std::int64_t n;         // >= 1
  double divisor;
};

void weighted_sum(const WeightedSum& args, std::int64_t begin, std::int64_t end);

}  // namespace mk
