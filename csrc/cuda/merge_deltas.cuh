// Merged task vectors, and sums and counts over them, on a GPU; the arithmetic of
// csrc/merge_deltas.h and csrc/deltas.h.
#pragma once

#include <cuda_runtime_api.h>

#include "../merge_deltas.h"

namespace mk::cuda {

// A model and the KeepRule of its task vector: eleven words of a table on the device. Numbers of
// other kinds than `kind` are not read.
struct DeltaRule {
  const void* x;  // contiguous
  std::int64_t kind;
  std::uint64_t low;
  std::int64_t low_cut;
  std::uint64_t high;
  std::int64_t high_cut;
  std::uint64_t k0, k1;
  std::int64_t limit, first;
  const std::uint8_t* bits;
};
static_assert(sizeof(DeltaRule) == 11 * 8, "as Python makes it");

struct DeltaTable {
  const void* base;        // contiguous; nullptr: zero
  const DeltaRule* rules;  // on the device, n
  DType dtype;             // of base and models
  std::int64_t n;          // >= 1
  std::int64_t numel;
  bool rounded;  // differences are, to `dtype`
  bool wide;     // base and all models begin at multiples of 16
};

struct MergeTable {
  DeltaTable deltas;  // rounded: stepwise
  void* out;          // contiguous; may be the base or a model, no other overlap
  DType out_dtype;
  bool wide_out;
  const void*
      factors;  // on the device, n times before, rescale, after, weight, alone: accumulators
  Elect elect;
  Zero zero;
  bool max, alone, normalize, divide;
  double total, least, instead, scale;
};

// Elements of a block of threads: what one row of `sums` and of `counts` is about.
constexpr std::int64_t kDeltaTile = 256 * 8;

// All enqueue on `stream` and do not wait; the tables must stay until the stream has passed.
cudaError_t merge_deltas(const MergeTable& args, int device, cudaStream_t stream);
// sums[t, i] = sum |d_i| and sum |d_i| over what is kept, of tile t.
cudaError_t l1_norms(const DeltaTable& args, double* sums, int device, cudaStream_t stream);
// counts[t, i] = kept d_i, counts[t, n] = conflicts, among elements [first, last) of tile t; tiles
// begin at `first` rounded down to a multiple of 8.
cudaError_t count_kept(const DeltaTable& args, std::int64_t first, std::int64_t last, int* counts,
                       int device, cudaStream_t stream);

}  // namespace mk::cuda
