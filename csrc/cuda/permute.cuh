// Gather along any axes on a GPU: out[r, c] = x[rows[r] + columns[c]]. Bits are moved, never
// interpreted.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mk::cuda {

// One tensor, in units of 1, 2, 4, 8 or 16 bytes, which divide its addresses. In memory of the
// device.
struct Move {
  void* out;  // contiguous, numel / width rows
  const void* x;
  const std::int64_t* rows;
  // Of gathers, 64-bit offsets; of staged gathers, 32-bit positions below `source`.
  const void* columns;
  std::int64_t numel;
  std::int64_t width;
  double inverse;       // 1 / width
  std::int64_t source;  // staged: the units of x behind each of `rows` that are read
  std::int64_t height;  // staged: rows of a tile
  std::int64_t first;   // the first of its tiles
};

enum class Moving : int {
  rows = 0,    // columns[c] = c, not read; tiles of kMoveTile units
  gather = 1,  // the same tiles
  staged = 2,  // source rows are read whole into shared memory, and gathered there
};

constexpr int kMoveTile = 1024;
constexpr int kMovePadding = 32;  // bytes that a staged row takes beside its own

struct Permute {
  const Move* moves;    // on the device
  const int* owners;    // on the device: the move of each tile
  std::int64_t tiles;   // >= 0
  std::int64_t shared;  // staged: bytes for the rows of a tile, up to 48 KiB
  int unit;
  Moving moving;
};

// Enqueues on `stream` of device number `device` and does not wait. The tables must stay in place
// until the stream has passed the kernel.
cudaError_t permute(const Permute& args, int device, cudaStream_t stream);

}  // namespace mk::cuda
