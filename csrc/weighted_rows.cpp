#include "weighted_rows.h"

#include <algorithm>

namespace mk {
namespace {

constexpr std::int64_t kRowsBlock = 256;  // as in weighted_sum.cpp, and for the same reason

template <class A>
MK_CLONES void convert(const double* from, A* to, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = A(from[i]);
}

// The weight of each of the elements [at, at + n), from the k weights of one input.
template <class A>
void spread(const double* weights, const WeightedRows& args, std::int64_t at, std::int64_t n,
            A* w) {
  std::int64_t r = at / args.inner % args.k;
  if (args.inner == 1) {
    for (std::int64_t i = 0, run; i < n; i += run, r = 0) {
      run = std::min(n - i, args.k - r);
      convert(weights + r, w + i, run);
    }
    return;
  }
  std::int64_t left = args.inner - at % args.inner;
  for (std::int64_t i = 0, run; i < n; i += run, left = args.inner) {
    run = std::min(n - i, left);
    std::fill(w + i, w + i + run, A(weights[r]));
    r = r + 1 == args.k ? 0 : r + 1;
  }
}

template <bool First, class T, class A>
MK_CLONES void add(const T* x, const A* w, A* acc, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const A p = A(widen(x[i])) * w[i];
    acc[i] = First ? p : acc[i] + p;
  }
}

}  // namespace

void weighted_rows(const WeightedRows& args, std::int64_t begin, std::int64_t end) {
  with_type(args.xs[0].dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = sum_t<T>;
    alignas(64) T gathered[kRowsBlock];
    alignas(64) A w[kRowsBlock];
    alignas(64) A acc[kRowsBlock];
    for (std::int64_t at = begin; at < end; at += kRowsBlock) {
      const std::int64_t n = std::min(kRowsBlock, end - at);
      const std::int64_t next = std::min(kRowsBlock, end - at - n);
      for (std::int64_t i = 0; i < args.n; ++i) {
        prefetch_block<T>(args.xs[i], at + n, next);
        const T* x = read_block(args.xs[i], at, n, gathered);
        spread(args.weights + i * args.k, args, at, n, w);
        if (i == 0)
          add<true>(x, w, acc, n);
        else
          add<false>(x, w, acc, n);
      }
      write_block(args.out, at, n, acc);
    }
    if (args.out.stream) stream_fence();
  });
}

}  // namespace mk
