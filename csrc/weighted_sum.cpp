#include "weighted_sum.h"

#include <algorithm>

namespace mk {
namespace {

template <class T>
MK_CLONES void scale(const T* x, acc_t<T> w, acc_t<T>* acc, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) acc[i] = widen(x[i]) * w;
}

template <class T>
MK_CLONES void axpy(const T* x, acc_t<T> w, acc_t<T>* acc, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) acc[i] += widen(x[i]) * w;
}

template <class A>
MK_CLONES void divide(A* acc, A divisor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) acc[i] /= divisor;
}

// Streams that a processor follows by itself: more of them in turn halved the bandwidth.
constexpr std::int64_t kFollowed = 4;

}  // namespace

void weighted_sum(const WeightedSum& args, std::int64_t begin, std::int64_t end) {
  with_type(args.xs[0].dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = acc_t<T>;
    alignas(64) T gathered[kBlock];
    alignas(64) A acc[kBlock];
    for (std::int64_t at = begin; at < end; at += kBlock) {
      const std::int64_t n = std::min(kBlock, end - at);
      const std::int64_t next = args.n > kFollowed ? std::min(kBlock, end - at - n) : 0;
      for (std::int64_t i = 0; i < args.n; ++i) {
        prefetch_block<T>(args.xs[i], at + n, next);
        const T* x = read_block(args.xs[i], at, n, gathered);
        if (i == 0)
          scale(x, A(args.weights[i]), acc, n);
        else
          axpy(x, A(args.weights[i]), acc, n);
      }
      if (args.divisor != 1.0) divide(acc, A(args.divisor), n);
      write_block(args.out, at, n, acc);
    }
    if (args.out.stream) stream_fence();
  });
}

}  // namespace mk
