// out_e = sum_i w_ir x_ie with r = e / inner % k, over elements e of [begin, end).
//
// inner = numel / k gives every one of k rows weights of its own, inner = 1 every one of k columns.
// Arithmetic: as weighted_sum without a divisor, the same accumulator and order.
#pragma once

#include "common.h"

namespace mk {

struct WeightedRows {
  View out;
  const View* xs;         // n views of one dtype and shape
  const double* weights;  // [n, k], contiguous; rounded to the accumulator
  std::int64_t n;         // >= 1
  std::int64_t k;         // >= 1
  std::int64_t inner;     // >= 1
};

void weighted_rows(const WeightedRows& args, std::int64_t begin, std::int64_t end);

}  // namespace mk
