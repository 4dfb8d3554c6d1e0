// csrc/cuda/tensor_cores.cuh on a host, by the layouts of the PTX manual. tensor_cores.cpp says how
// sums are rounded, and when a copy is seen.
#pragma once

#include "cuda_runtime.h"

namespace host_cuda {

void copy_later(void* to, const void* from);  // 16 bytes; zeros where `from` is null
void end_group();
void finish_groups(int left);

// What copies of a block there are on their way, and forgets them.
int forget_copies();

struct Rows {
  const void* row;
  std::uint32_t taken[4];
};
std::uint64_t transpose(const Brought* all, int of);

template <class T>
struct Fragments {
  const std::uint32_t* a;
  std::uint32_t b[2];
  const float* c;
  float sum[4];
};
template <class T>
std::uint64_t multiply(const Brought* all, int of);

}  // namespace host_cuda

namespace mk::cuda {

inline void copy_async(void* shared, const void* p, bool present) {
  host_cuda::copy_later(shared, present ? p : nullptr);
}
inline void copy_commit() { host_cuda::end_group(); }
template <int kLeft>
void copy_wait() {
  host_cuda::finish_groups(kLeft);
}

inline void load_transposed(std::uint32_t (&r)[4], const void* row,
                            const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host_cuda::Rows rows{row, {}};
  host_cuda::meet_warp(~0u, std::uint64_t(&rows), 0, host_cuda::transpose, file, line);
  std::memcpy(r, rows.taken, sizeof(r));
}

template <class T>
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host_cuda::Fragments<T> lane{a, {b0, b1}, c, {}};
  host_cuda::meet_warp(~0u, std::uint64_t(&lane), 0, host_cuda::multiply<T>, file, line);
  std::memcpy(c, lane.sum, sizeof(c));
}

}  // namespace mk::cuda
