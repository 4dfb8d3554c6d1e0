// out[g, h] = sum_i sum_r sum_c f_i x_i[r, c] / d: rows r of group g and columns c of group h of
// every model i.
//
// Arithmetic: accumulator sum_t. Every product is rounded. Products of one model and column are
// added over the rows of g, ascending, the first as it is; these sums are added to -0, by model in
// input order, by column ascending. The total is divided by d and rounded once at the store. An
// element without terms is -0 / d. NaN stays in its group.
#pragma once

#include "common.h"

namespace mk {

// One model: rows of `width` elements each, next to each other.
struct ZipInput {
  const void* data;
  std::int64_t width;
  std::int64_t row_stride;
  const std::int64_t* starts;   // members[starts[g]] ... are the rows of group g, ascending;
  const std::int64_t* members;  // both nullptr: row g alone
  // At most one of them; where both are nullptr, columns stay.
  const std::int64_t* targets;    // the column of the result of each column
  const std::int32_t* positions;  // the column of each column of the result, a permutation; no
                                  // group of rows has more than one then
  double factor;                  // f_i, rounded to the accumulator
};

struct ZipWeights {
  View out;  // contiguous, of the inputs' dtype
  std::int64_t width;
  const ZipInput* xs;
  std::int64_t n;
  const double* row_divisors;     // d of each row, or, where nullptr,
  const double* column_divisors;  // of each column; rounded to the accumulator
};

constexpr int kZipRows = 8;           // rows that are done together, or a multiple of their number
constexpr int kZipPieces = 16 * 256;  // bytes of a piece of such rows

// Rows [begin, end) of the result. `scratch`: with targets, which all inputs have then, 32 bytes
// for each column of the result, their number rounded up to a multiple of kZipRows; else, for each
// input with positions, 16 bytes for each column and kZipPieces.
void zip_weights(const ZipWeights& args, std::int64_t begin, std::int64_t end, void* scratch);

// Rows of each group, ascending: members[starts[g]] ... members[starts[g + 1] - 1] for g < groups.
// Labels lie in [0, groups). Returns the size of the largest group.
std::int64_t group_members(const std::int64_t* labels, std::int64_t n, std::int64_t groups,
                           std::int64_t* starts, std::int64_t* members);

}  // namespace mk
