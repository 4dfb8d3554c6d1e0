#include "gram.h"

#include <algorithm>

#include "dots.h"

namespace mk {
namespace {

constexpr std::int64_t kInRegisters = 4;  // vectors up to which no block is stored in between

constexpr std::int64_t pairs(std::int64_t n) { return n * (n + 1) / 2; }

// Adds up the products of n <= kGramBlock elements of N vectors: kGramLanes sums for each pair.
// As many lanes at a time as fit in registers with the pairs.
template <int N, bool kBase, class T>
MK_DOT_CLONES void add_products(const T* const* xs, const T* base, std::int64_t n, double* sums) {
  constexpr int kFours = N <= 2 ? 4 : 2;
  const T* x[N];
  for (int k = 0; k < N; ++k) x[k] = xs[k];
  const std::int64_t whole = n - n % kGramLanes;
  for (int lane = 0; lane < kGramLanes; lane += kFours * kFour) {
    Four lanes[pairs(N)][kFours] = {};
    for (std::int64_t i = 0; i < whole; i += kGramLanes)
      for (int h = 0; h < kFours; ++h) {
        const std::int64_t at = i + lane + h * kFour;
        Four v[N], b;
        if constexpr (kBase) load(base + at, &b);
        for (int k = 0; k < N; ++k) {
          load(x[k] + at, &v[k]);
          if constexpr (kBase) v[k] -= b;
        }
        for (int a = 0, p = 0; a < N; ++a)
          for (int c = a; c < N; ++c, ++p) lanes[p][h] += v[a] * v[c];
      }
    for (int p = 0; p < pairs(N); ++p)
      for (int h = 0; h < kFours; ++h)
        add_to(sums + p * kGramLanes + lane + h * kFour, lanes[p][h]);
  }
  for (std::int64_t i = whole; i < n; ++i) {
    double v[N];
    for (int k = 0; k < N; ++k) {
      v[k] = x[k][i];
      if constexpr (kBase) v[k] -= double(base[i]);
    }
    for (int a = 0, p = 0; a < N; ++a)
      for (int c = a; c < N; ++c, ++p) sums[p * kGramLanes + i - whole] += v[a] * v[c];
  }
}

// The same for one vector of doubles against N others, kGramBlock apart.
template <int N>
MK_DOT_CLONES void add_products_with(const double* x, const double* ys, std::int64_t n,
                                     double* sums) {
  constexpr int kFours = N <= 2 ? 4 : 2;
  const std::int64_t whole = n - n % kGramLanes;
  for (int lane = 0; lane < kGramLanes; lane += kFours * kFour) {
    Four lanes[N][kFours] = {};
    for (std::int64_t i = 0; i < whole; i += kGramLanes)
      for (int h = 0; h < kFours; ++h) {
        const std::int64_t at = i + lane + h * kFour;
        Four v, w;
        load(x + at, &v);
        for (int p = 0; p < N; ++p) {
          load(ys + p * kGramBlock + at, &w);
          lanes[p][h] += v * w;
        }
      }
    for (int p = 0; p < N; ++p)
      for (int h = 0; h < kFours; ++h)
        add_to(sums + p * kGramLanes + lane + h * kFour, lanes[p][h]);
  }
  for (std::int64_t i = whole; i < n; ++i)
    for (int p = 0; p < N; ++p) sums[p * kGramLanes + i - whole] += x[i] * ys[p * kGramBlock + i];
}

MK_CLONES void add_elementwise(const double* x, const double* y, std::int64_t n, double* sums) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += x[i] * y[i];
}

// f(std::integral_constant<int, n>{}) for n of 1 to 4.
template <class F>
void with_count(std::int64_t n, F&& f) {
  switch (n) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    default:
      return f(std::integral_constant<int, 4>{});
  }
}

template <class T>
void sum_few(const Gram& args, std::int64_t begin, std::int64_t end, double* sums) {
  with_count(args.n, [&](auto count) {
    constexpr int N = count;
    alignas(64) Block<T> blocks[N + 1];
    decltype(blocks[0].read(args.xs[0], 0, 0)) xs[N];
    for (std::int64_t at = begin; at < end; at += kGramBlock) {
      const std::int64_t n = std::min(kGramBlock, end - at);
      const std::int64_t later = at + kAhead * kGramBlock;
      const std::int64_t some = std::clamp<std::int64_t>(end - later, 0, kGramBlock);
      for (int k = 0; k < N; ++k) prefetch_block<T>(args.xs[k], later, some);
      if (args.base) prefetch_block<T>(*args.base, later, some);
      for (int k = 0; k < N; ++k) xs[k] = blocks[k].read(args.xs[k], at, n);
      if (args.base)
        add_products<N, true>(xs, blocks[N].read(*args.base, at, n), n, sums);
      else
        add_products<N, false>(xs, xs[0], n, sums);
    }
  });
}

template <class T>
void sum_many(const Gram& args, std::int64_t begin, std::int64_t end, double* sums) {
  alignas(64) T gathered[kGramBlock], gathered_base[kGramBlock];
  double* blocks = sums + pairs(args.n) * kGramLanes;
  for (std::int64_t at = begin; at < end; at += kGramBlock) {
    const std::int64_t n = std::min(kGramBlock, end - at);
    const T* base = args.base ? read_block(*args.base, at, n, gathered_base) : nullptr;
    for (std::int64_t i = 0; i < args.n; ++i)
      subtract(read_block(args.xs[i], at, n, gathered), base, blocks + i * kGramBlock, n);
    double* sum = sums;
    for (std::int64_t i = 0; i < args.n; ++i)
      for (std::int64_t j = i, some; j < args.n; j += some, sum += some * kGramLanes) {
        some = std::min(kInRegisters, args.n - j);
        with_count(some, [&](auto count) {
          add_products_with<count>(blocks + i * kGramBlock, blocks + j * kGramBlock, n, sum);
        });
      }
  }
}

}  // namespace

std::int64_t gram_scratch(std::int64_t n) {
  return pairs(n) * kGramLanes + (n > kInRegisters ? n * kGramBlock : 0);
}

void gram(const Gram& args, std::int64_t begin, std::int64_t end, double* scratch, double* dots) {
  const std::int64_t n = args.n;
  std::fill(scratch, scratch + pairs(n) * kGramLanes, 0.0);
  with_type(args.xs[0].dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto sum = n <= kInRegisters ? sum_few<T> : sum_many<T>;
    sum(args, begin, end, scratch);
  });
  const double* lane = scratch;
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = i; j < n; ++j, lane += kGramLanes) {
      double total = 0;
      for (int l = 0; l < kGramLanes; ++l) total += lane[l];
      dots[i * n + j] = dots[j * n + i] = total;
    }
}

void gram_rows(const Gram& args, std::int64_t width, std::int64_t begin, std::int64_t end,
               double* scratch, double* dots) {
  for (std::int64_t row = begin; row < end; ++row)
    gram(args, row * width, (row + 1) * width, scratch, dots + row * args.n * args.n);
}

void gram_columns(const Gram& args, std::int64_t length, std::int64_t begin, std::int64_t end,
                  double* scratch, double* dots) {
  const std::int64_t n = args.n;
  double *sums = scratch, *rows = scratch + pairs(n) * kGramBlock;
  with_type(args.xs[0].dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto row = [](const View& v, std::int64_t r) {
      return static_cast<const T*>(v.data) + r * v.strides[0];
    };
    for (std::int64_t at = begin; at < end; at += kGramBlock) {
      const std::int64_t count = std::min(kGramBlock, end - at);
      std::fill(sums, rows, 0.0);
      for (std::int64_t r = 0; r < length; ++r) {
        const T* base = args.base ? row(*args.base, r) + at : nullptr;
        double* sum = sums;
        for (std::int64_t i = 0; i < n; ++i)
          subtract(row(args.xs[i], r) + at, base, rows + i * kGramBlock, count);
        for (std::int64_t i = 0; i < n; ++i)
          for (std::int64_t j = i; j < n; ++j, sum += kGramBlock)
            add_elementwise(rows + i * kGramBlock, rows + j * kGramBlock, count, sum);
      }
      const double* sum = sums;
      for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t j = i; j < n; ++j, sum += kGramBlock)
          for (std::int64_t c = 0; c < count; ++c) {
            double* out = dots + (at + c) * n * n;
            out[i * n + j] = out[j * n + i] = sum[c];
          }
    }
  });
}

}  // namespace mk
