// Dot products of a gradient with n task vectors, in one pass.
//
// The arithmetic of gram.h: every value is widened to double before the subtraction, and a range is
// added up in the same blocks and lanes. Its bits are those that `gram` gives the same vectors.
#pragma once

#include "common.h"

namespace mk {

struct CoefficientGradients {
  const View* grad;  // of any type
  const View* xs;
  std::int64_t n;
  const View* base;  // nullptr: zero
};

// dots[t] = sum_e grad_e (x_t - b)_e over elements [begin, end).
// `scratch`: n * kGramLanes doubles.
void coefficient_gradients(const CoefficientGradients& args, std::int64_t begin, std::int64_t end,
                           double* scratch, double* dots);

}  // namespace mk
