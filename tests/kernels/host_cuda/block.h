// How a grid runs on a host: block after block, and the threads of a block as fibers of one system
// thread. A thread runs until it meets others, at a barrier or in a warp function.
//
// MERGEKERN_HOST_CUDA_ORDER (0 by default) chooses the order of blocks and of threads: results may
// not depend on it. Shared memory holds 0xA5 before each block. Errors: threads that wait for some
// that never come or have ended, a block that waits in two places, dynamic shared memory that is
// written past its end, copies that nobody waited for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace host_cuda {

extern dim3 grid_dim, block_dim;
extern uint3 block_index, thread_index;
extern void* dynamic_shared;

inline int linear_thread() {
  return int((thread_index.z * block_dim.y + thread_index.y) * block_dim.x + thread_index.x);
}

// Waits for all threads of the block; the sum of what they bring.
int meet_block(int vote, const char* file, int line);

// What a lane brings to the lanes that it meets, and what lane `of` learns from all 32.
struct Brought {
  bool present;
  std::uint64_t value;
  int argument;
};
using Learn = std::uint64_t (*)(const Brought* all, int of);

std::uint64_t ballot(const Brought* all, int of);  // a bit per lane
std::uint64_t take(const Brought* all, int of);    // the value of lane `argument`
std::uint64_t match(const Brought* all, int of);   // the lanes with the same value
std::uint64_t sum(const Brought* all, int of);
std::uint64_t greatest(const Brought* all, int of);

// Waits for the lanes of `mask`.
std::uint64_t meet_warp(unsigned mask, std::uint64_t value, int argument, Learn learn,
                        const char* file, int line);

// Runs `thread` for every thread of the grid; throws std::runtime_error for those errors.
void run(dim3 blocks, dim3 threads, std::size_t shared, const std::function<void()>& thread);

}  // namespace host_cuda
