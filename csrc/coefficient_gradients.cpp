#include "coefficient_gradients.h"

#include <algorithm>

#include "dots.h"

namespace mk {
namespace {

// Adds up the products of n <= kGramBlock elements of a task vector with the gradient's. Asks for
// memory from the address `ahead` on, `step` bytes with each kGramLanes elements: for a whole block
// at once, of ten tensors, took a fifth longer.
template <bool kBase, class T>
MK_DOT_CLONES void add_products(const T* x, const double* base, const double* grad, std::int64_t n,
                                std::uintptr_t ahead, std::int64_t step, double* sums) {
  constexpr int kFours = kGramLanes / kFour;
  const std::int64_t whole = n - n % kGramLanes;
  Four lanes[kFours] = {};
  for (std::int64_t i = 0; i < whole; i += kGramLanes, ahead += step) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead));
    for (int h = 0; h < kFours; ++h) {
      const std::int64_t at = i + h * kFour;
      Four v, b, g;
      load(x + at, &v);
      if constexpr (kBase) {
        load(base + at, &b);
        v -= b;
      }
      load(grad + at, &g);
      lanes[h] += v * g;
    }
  }
  for (int h = 0; h < kFours; ++h) add_to(sums + h * kFour, lanes[h]);
  for (std::int64_t i = whole; i < n; ++i) {
    double v = x[i];
    if constexpr (kBase) v -= base[i];
    sums[i - whole] += v * grad[i];
  }
}

// Elements [at, at + n) as doubles; asks for `some` from `later` on.
void widen_block(const View& v, std::int64_t at, std::int64_t n, std::int64_t later,
                 std::int64_t some, double* values) {
  with_type(v.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    T gathered[kGramBlock];
    prefetch_block<T>(v, later, some);
    subtract<T>(read_block(v, at, n, gathered), nullptr, values, n);
  });
}

template <class T>
void sum_products(const CoefficientGradients& args, std::int64_t begin, std::int64_t end,
                  double* sums) {
  using V = std::conditional_t<sizeof(T) == 2, float, T>;  // as Block has them
  alignas(64) Block<T> block;
  alignas(64) double grad[kGramBlock], base[kGramBlock];
  for (std::int64_t at = begin; at < end; at += kGramBlock) {
    const std::int64_t n = std::min(kGramBlock, end - at);
    const std::int64_t later = at + kAhead * kGramBlock;
    const std::int64_t some = std::clamp<std::int64_t>(end - later, 0, kGramBlock);
    widen_block(*args.grad, at, n, later, some, grad);
    if (args.base) widen_block(*args.base, at, n, later, some, base);
    for (std::int64_t t = 0; t < args.n; ++t) {
      const View& v = args.xs[t];
      const auto ahead =
          reinterpret_cast<std::uintptr_t>(v.data) + std::uintptr_t(later) * sizeof(T);
      const auto add = args.base ? add_products<true, V> : add_products<false, V>;
      add(block.read(v, at, n), base, grad, n, ahead, kGramLanes * sizeof(T),
          sums + t * kGramLanes);
    }
  }
}

}  // namespace

void coefficient_gradients(const CoefficientGradients& args, std::int64_t begin, std::int64_t end,
                           double* scratch, double* dots) {
  std::fill(scratch, scratch + args.n * kGramLanes, 0.0);
  with_type(args.xs[0].dtype, [&](auto* tag) {
    sum_products<std::remove_pointer_t<decltype(tag)>>(args, begin, end, scratch);
  });
  for (std::int64_t t = 0; t < args.n; ++t) {
    const double* lanes = scratch + t * kGramLanes;
    double total = 0;
    for (int l = 0; l < kGramLanes; ++l) total += lanes[l];
    dots[t] = total;
  }
}

}  // namespace mk
