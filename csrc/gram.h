// Dot products of n long vectors, in one pass: dots[i * n + j] += sum_e (x_i - b)_e (x_j - b)_e.
//
// Every value is widened to double before the subtraction; products and sums are double, in 16
// interleaved partial sums over [begin, end), so a fixed split of the range gives fixed bits.
#pragma once

#include "common.h"

namespace mk {

struct Gram {
  const View* xs;
  std::int64_t n;
  const View* base;  // nullptr: zero
};

constexpr std::int64_t kGramBlock = 256;
// `scratch`: n * kGramBlock doubles. Only i <= j of `dots` is touched.
void gram(const Gram& args, std::int64_t begin, std::int64_t end, double* scratch, double* dots);

}  // namespace mk
