#include "gram.h"

#include <algorithm>

namespace mk {
namespace {

constexpr int kLanes = 16;

template <class T>
MK_CLONES void to_double(const T* x, const T* base, double* out, std::int64_t n) {
  if (base)
    for (std::int64_t i = 0; i < n; ++i) out[i] = double(widen(x[i])) - double(widen(base[i]));
  else
    for (std::int64_t i = 0; i < n; ++i) out[i] = double(widen(x[i]));
}

MK_CLONES double dot(const double* x, const double* y, std::int64_t n) {
  double lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += x[i + l] * y[i + l];
  for (int l = 0; i < n; ++i, ++l) lanes[l] += x[i] * y[i];
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

}  // namespace

void gram(const Gram& args, std::int64_t begin, std::int64_t end, double* scratch, double* dots) {
  with_type(args.xs[0].dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    alignas(64) T gathered[kGramBlock], gathered_base[kGramBlock];
    for (std::int64_t at = begin; at < end; at += kGramBlock) {
      const std::int64_t n = std::min(kGramBlock, end - at);
      const T* base = args.base ? read_block(*args.base, at, n, gathered_base) : nullptr;
      for (std::int64_t i = 0; i < args.n; ++i)
        to_double(read_block(args.xs[i], at, n, gathered), base, scratch + i * kGramBlock, n);
      for (std::int64_t i = 0; i < args.n; ++i)
        for (std::int64_t j = i; j < args.n; ++j)
          dots[i * args.n + j] += dot(scratch + i * kGramBlock, scratch + j * kGramBlock, n);
    }
  });
}

}  // namespace mk
