// One pass over task vectors: out = base + scale * combine_i(factor_i * keep_i(x_i - base)).
//
// Arithmetic in float (double for f64), every step rounded, in input order:
//   d_i = x_i - base;  v_i = factor_i d_i where element is kept, else +0
//   no election:   m = 0 + v_0 + v_1 + ...;             q = total weight
//   by sum:        s = 0 + v_0 + v_1 + ...;             positive if s >= 0
//   by count:      s = #(v_i > 0) - #(v_i < 0);         positive if s >= 0
//     agreeing i:  not (v_i <= 0) if positive, else not (v_i >= 0), so a NaN always agrees
//     m = 0 + sum of agreeing v_i;  q = 0 + sum of agreeing weight_i, 1 where that is 0
//     by sum, s NaN (infinities of both signs): m = s
//   out = base + scale * (m / q), the division only if normalize, one rounding at the store
#pragma once

#include "common.h"
#include "philox.h"

namespace mk {

enum class Keep : int { all = 0, magnitude = 1, random = 2 };
enum class Elect : int { none = 0, sum = 1, count = 2 };

// What survives of one task vector. magnitude: key > threshold, or key == threshold and flat
// index < cut. random: the 16-bit Philox draw of the element < limit (limit 65536 keeps all).
struct KeepRule {
  Keep kind = Keep::all;
  std::uint64_t threshold = 0;
  std::int64_t cut = 0;
  PhiloxKey key = {0, 0};
  std::uint32_t limit = 0;
};

struct MergeDeltas {
  View out;
  const View* base;       // nullptr: zero, nothing is added at the end
  const View* xs;         // n views of the dtype of base
  const double* weights;  // q is made of these
  const double* factors;  // weight_i, times the rescale of task vector i
  const KeepRule* keep;   // n rules
  std::int64_t n;         // >= 1
  Elect elect;
  bool normalize;
  double total;  // q without election
  double scale;
};

constexpr std::int64_t kMergeBlock = 512;
// `scratch`: n * kMergeBlock accumulators, one per calling thread.
void merge_deltas(const MergeDeltas& args, std::int64_t begin, std::int64_t end, void* scratch);

// sums[0] += sum |d|, sums[1] += sum |d| over kept elements, d = x - base, in double, in order
// within 16 interleaved partial sums.
void l1_norms(const View& x, const View* base, const KeepRule& keep, std::int64_t begin,
              std::int64_t end, double* sums);

}  // namespace mk
