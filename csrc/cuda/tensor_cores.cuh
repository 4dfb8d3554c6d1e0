// Tensor cores and the copies that feed them, of compute capability 8.0 on; only .cu files include
// this. A host has its own: tests/kernels/host_cuda/tensor_cores.h.
#pragma once

#include "common.cuh"

#ifdef __CUDACC__

namespace mk::cuda {

// Sixteen bytes into shared memory, or zeros where `present` is false. Copies since the last
// copy_commit are a group.
__device__ inline void copy_async(void* shared, const void* p, bool present) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(p),
               "r"(present ? 16 : 0)
               : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups but the latest kLeft; others see them behind a barrier.
template <int kLeft>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four matrices of 8 x 8 elements of 16 bits, transposed. Lane 8 i + r brings the address of row r
// of matrix i; lane l receives elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4) of each.
__device__ inline void load_transposed(std::uint32_t (&r)[4], const void* row) {
  const unsigned at = unsigned(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// c += a b for 16 x 16, 16 x 8 and 16 x 8 elements. With g = lane / 4 and t = lane % 4, a lane
// holds rows g and g + 8 of a in columns 2 t, 2 t + 1 (a[0], a[1]) and 2 t + 8, 2 t + 9 (a[2],
// a[3]); column g of b in rows 2 t, 2 t + 1 (b0) and 2 t + 8, 2 t + 9 (b1); and rows g (c[0],
// c[1]) and g + 8 (c[2], c[3]) of c in columns 2 t and 2 t + 1.
template <class T>
__device__ inline void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1) {
#define MK_MMA(type)                                                         \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, bf16>)
    MK_MMA("bf16");
  else
    MK_MMA("f16");
#undef MK_MMA
}

}  // namespace mk::cuda

#else
#include "tensor_cores.h"
#endif
