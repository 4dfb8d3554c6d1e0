// Gather along any axes: out[i, j, ...] = x[i', j', ...] with i' = index_0[i] where axis 0 has an
// index, else i. Bits are moved, never interpreted.
#pragma once

#include "common.h"

namespace mk {

// One axis of the result. Without an index, step j lies j * stride elements away; with one,
// offsets[j] elements (index times stride, done by the caller).
struct Axis {
  std::int64_t size;
  std::int64_t stride;
  const std::int64_t* offsets;  // nullptr: no index
};

struct Permute {
  void* out;  // contiguous
  const void* x;
  std::int64_t itemsize;  // 1, 2, 4, 8 or 16 bytes
  int ndim;               // >= 1
  Axis axes[kMaxDims];
  bool stream;  // the result is larger than the caches: write past them

  // A last axis with an index over contiguous rows, as 32-bit positions; nullptr otherwise.
  const std::int32_t* positions;
  std::int64_t row_size;  // elements of such a source row
};

// Rows [begin, end) of the result; a row is one step through all axes but the last. `scratch`:
// row_size * 16 bytes where `positions` is given.
void permute(const Permute& args, std::int64_t begin, std::int64_t end, void* scratch);

}  // namespace mk
