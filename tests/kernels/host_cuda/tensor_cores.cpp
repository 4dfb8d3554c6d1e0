#include "tensor_cores.h"

#include <algorithm>
#include <vector>

namespace host_cuda {

// ---- copies: they spoil where they go at once, and arrive when their thread waits for them ------

namespace {

constexpr int kBytes = 16;
constexpr int kThreads = 1024;

struct Copy {
  void* to;
  const void* from;
};
struct Groups {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> closed;
};
Groups groups[kThreads];

}  // namespace

void copy_later(void* to, const void* from) {
  std::memset(to, 0xa5, kBytes);
  groups[linear_thread()].open.push_back({to, from});
}

void end_group() {
  Groups& mine = groups[linear_thread()];
  mine.closed.push_back(std::move(mine.open));
  mine.open.clear();
}

void finish_groups(int left) {
  auto& closed = groups[linear_thread()].closed;
  const int done = std::max(0, int(closed.size()) - left);
  for (int g = 0; g < done; ++g)
    for (const Copy& copy : closed[g])
      if (copy.from)
        std::memcpy(copy.to, copy.from, kBytes);
      else
        std::memset(copy.to, 0, kBytes);
  closed.erase(closed.begin(), closed.begin() + done);
}

int forget_copies() {
  std::size_t left = 0;
  for (Groups& each : groups) {
    left += each.open.size();
    for (const auto& group : each.closed) left += group.size();
    each.open.clear();
    each.closed.clear();
  }
  return int(left);
}

// ---- fragments --------------------------------------------------------------------------------

namespace {

template <class Lane>
Lane& of_lane(const Brought* all, int lane) {
  return *reinterpret_cast<Lane*>(all[lane].value);
}

// The half of a register.
template <class T>
double element(std::uint32_t pair, int half) {
  return double(mk::widen(T{std::uint16_t(pair >> 16 * half)}));
}

// As tests/kernels/tensor_cores.py: all numbers are aligned to the largest with two bits beyond a
// float's, cut off there, added up, and the sum is cut off to a float.
float aligned_sum(const double (&x)[17]) {
  double largest = 0, plain = 0;
  for (double each : x) largest = std::max(largest, std::fabs(each)), plain += each;
  if (plain - plain != 0) return float(plain);
  if (largest == 0) return 0;
  // The factor that leaves 26 bits of the largest before the point: its exponent is far from the
  // ends of the range.
  const std::uint64_t exponent = mk::bit_cast<std::uint64_t>(largest) >> 52;
  const double factor = mk::bit_cast<double>((2 * 1023 + 25 - exponent) << 52);
  std::int64_t sum = 0;
  for (double each : x) sum += std::int64_t(each * factor);
  return __double2float_rz(double(sum) / factor);
}

}  // namespace

std::uint64_t transpose(const Brought* all, int of) {
  Rows& mine = of_lane<Rows>(all, of);
  for (int i = 0; i < 4; ++i) {
    mine.taken[i] = 0;
    for (int half = 0; half < 2; ++half) {
      const void* row = of_lane<Rows>(all, 8 * i + 2 * (of % 4) + half).row;
      std::uint16_t bits = 0xa5a5;  // a row must begin at a multiple of 16 bytes
      if (std::uintptr_t(row) % 16 == 0)
        std::memcpy(&bits, static_cast<const char*>(row) + 2 * (of / 4), 2);
      mine.taken[i] |= std::uint32_t(bits) << 16 * half;
    }
  }
  return 0;
}

// Lane 0 learns, for all of them.
template <class T>
std::uint64_t multiply(const Brought* all, int of) {
  if (of > 0) return 0;
  double a[16][16], b[8][16];  // [row][k] and [column][k]
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = of_lane<Fragments<T>>(all, lane);
    for (int half = 0; half < 2; ++half)
      for (int upper = 0; upper < 2; ++upper) {
        const int k = 8 * upper + 2 * (lane % 4) + half;
        b[lane / 4][k] = element<T>(mine.b[upper], half);
        for (int lower = 0; lower < 2; ++lower)
          a[lane / 4 + 8 * lower][k] = element<T>(mine.a[lower + 2 * upper], half);
      }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = of_lane<Fragments<T>>(all, lane);
    for (int e = 0; e < 4; ++e) {
      const double* row = a[lane / 4 + 8 * (e / 2)];
      const double* column = b[2 * (lane % 4) + e % 2];
      double terms[17];
      for (int k = 0; k < 16; ++k) terms[k] = row[k] * column[k];
      terms[16] = mine.c[e];
      mine.sum[e] = aligned_sum(terms);
    }
  }
  return 0;
}

template std::uint64_t multiply<mk::bf16>(const Brought* all, int of);
template std::uint64_t multiply<mk::f16>(const Brought* all, int of);

}  // namespace host_cuda
