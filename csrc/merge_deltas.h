// One pass over task vectors: out = base + scale * combine_i(keep_i(x_i - base)).
//
// Arithmetic in float (double for f64), every step rounded, in input order:
//   d_i = x_i - base;  u_i = before_i d_i where element is kept, else +0;  v_i = after_i u_i
//   s = 0 + u_0 + u_1 + ...
//   who takes part:
//     everyone   all: m = s, q = total weight (`after` is not used)
//     present    i with u_i != 0 (a NaN is)
//     sum        i whose u_i has the sign of s
//     count      i whose u_i has the sign of #(u_i > 0) - #(u_i < 0)
//       where the vote is 0: the sign that `zero` says; a NaN u_i takes part under either sign
//   sum:  m = 0 + sum of v_i that take part;   q = 0 + sum of their weight_i
//   max:  m = the first v_i of largest magnitude among those that take part (NaN the largest), or 0
//   by sum, s NaN (infinities of both signs): m = s
//   alone (present only): where exactly one takes part, m = alone_i u_i instead
//   out = base + scale * (m / q), the division only if normalize, by `instead` where |q| <= least;
//   one rounding at the store
//
// stepwise: every d_i, u_i, v_i, s, m, q, quotient and product is rounded to the type of the xs at
// once, u_i = R(before_i R(rescale_i d_i)), or R(before_i R(d_i / rescale_i)) if divide, and
// scale 1 and rescale 1 take no step. What is not kept is d_i * 0, as where tools multiply by a
// mask: -0 for a negative d_i, NaN for NaN and infinity.
#pragma once

#include "deltas.h"

namespace mk {

enum class Elect : int { everyone = 0, present = 1, sum = 2, count = 3 };
enum class Zero : int { positive = 0, negative = 1, none = 2 };  // the sign of a tied vote

struct MergeDeltas {
  View out;
  const View* base;  // nullptr: zero, nothing is added at the end
  const View* xs;    // n views of the dtype of base
  const KeepRule* keep;
  const double* before;
  const double* after;
  const double* weights;  // q is made of these
  const double* alone;    // nullptr: no such rule
  const double* rescale;  // stepwise only
  std::int64_t n;         // >= 1
  Elect elect;
  Zero zero;
  bool max;
  bool normalize;
  bool stepwise, divide;
  double total;  // q of everyone
  double least, instead;
  double scale;
};

constexpr std::int64_t kMergeBlock = kDeltaBlock;
// `scratch`: n * kMergeBlock accumulators, one per calling thread.
void merge_deltas(const MergeDeltas& args, std::int64_t begin, std::int64_t end, void* scratch);

}  // namespace mk
