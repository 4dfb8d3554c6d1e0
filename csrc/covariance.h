// Second moments of rows: sums of products of centred features, chunk by chunk of rows.
//
// A chunk of rows is added in three steps.
// 1. column_means: mean and largest magnitude of each feature, in double, about the first row (so
//    a constant feature has exactly its value as mean).
// 2. pack: v = x scale - shift scale in the accumulator of the stored type (float, or double for
//    double), where shift is the mean rounded to it and scale a power of two that makes |v| <= 8,
//    so that no product or sum leaves its range. Features lie in panels of kPanelBytes, those of
//    several tensors of a side one after the other.
// 3. add_products: sums of v_i v_j over kPartialRows rows in the accumulator, in order, by FMA
//    where there is one; each partial sum is added to a double, in order, and the chunk's total
//    S to `products` with the two corrections
//      M_ij += S_ij / (scale_i scale_j) + weighted_i delta_j - weighted_rest_i rest_j,
//    by which Chan's formula merges a chunk of n rows into a moment of N rows:
//      delta = chunk's mean - mean, weighted = delta n N / (n + N),
//      rest = chunk's mean - shift, weighted_rest = n rest.
// Every sum has an order that depends on the chunk alone, so threads do not change bits; whether
// products are contracted to FMA depends on the instruction set.
#pragma once

#include "common.h"

namespace mk {

constexpr std::int64_t kPartialRows = 256;
constexpr std::int64_t kPanelBytes = 192;
template <class A>  // an accumulator
constexpr std::int64_t kPanel = kPanelBytes / std::int64_t(sizeof(A));

// Rows of `width` features: row r begins `offsets[r]` elements after `data`, features are `stride`
// elements apart. They are features [first, first + width) of the `side` ones that are taken as one
// row; arrays of one per feature are of all of these. `zero`: NaN and infinities count as 0.
struct Rows {
  const void* data;
  DType dtype;
  const std::int64_t* offsets;
  std::int64_t width, stride, first, side;
  bool zero;
};

// How a chunk is centred, and how it merges with what was before: arrays of one per feature.
struct Center {
  double *shift, *scale, *unscale, *delta, *weighted, *rest, *weighted_rest;
};
constexpr int kCenterArrays = 7;

// Means and largest magnitudes of features over rows [begin, end), at least one.
// Returns whether all are finite.
bool column_means(const Rows& x, std::int64_t begin, std::int64_t end, double* mean,
                  double* largest);

// The center of a chunk of n rows, and the mean of them and `count` rows before in `mean`.
void center(DType dtype, std::int64_t width, std::int64_t n, const double* chunk_mean,
            const double* largest, std::int64_t count, double* mean, const Center& out);

// Panels that `width` features fill; each has as many as fit in kPanelBytes.
std::int64_t panel_count(DType dtype, std::int64_t width);

// Rows [begin, end) of panels [first, last) into `panels`, where a panel is [rows, kPanelBytes]
// and its features beyond the last one of the side are 0. `squares`, if given, gets the moments of
// each feature with itself added, all in double.
void pack(const Rows& x, std::int64_t begin, std::int64_t end, const Center& center,
          std::int64_t first, std::int64_t last, void* panels, double* squares);

// Packed rows of one side, or of the same twice: pairs of panels that are multiplied.
struct Pairs {
  DType dtype;
  std::int64_t rows;
  const void *x, *y;  // equal: only products with i <= j
  std::int64_t width_x, width_y;
  Center center_x, center_y;
  double* products;  // [width_x, width_y]
};
std::int64_t pair_count(const Pairs& args);

// Adds the products of pairs [begin, end) of panels.
void add_products(const Pairs& args, std::int64_t begin, std::int64_t end);

}  // namespace mk
