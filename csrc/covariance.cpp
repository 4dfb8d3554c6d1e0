#include "covariance.h"

#include <algorithm>
#include <cmath>

namespace mk {
namespace {

// ---- products ----------------------------------------------------------------------------------

// sums[i][j] += v_i v_j over rows, for kRows features from `x` on and kVectors vectors from `y` on,
// both in panels. The sums of kPartialRows rows stay in registers, if loops over them are unrolled.
template <class A, int kBytes, int kRows, int kVectors>
MK_INLINE void multiply(const A* x, const A* y, std::int64_t rows, double* sums) {
  constexpr int kLanes = kBytes / int(sizeof(A));
  constexpr std::int64_t kWidth = kPanel<A>;
  typedef A Vector __attribute__((vector_size(kBytes)));
  for (std::int64_t begin = 0; begin < rows; begin += kPartialRows) {
    const std::int64_t end = std::min(rows, begin + kPartialRows);
    Vector partial[kRows][kVectors] = {};
    for (std::int64_t r = begin; r < end; ++r) {
      Vector v[kVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j)
        std::memcpy(&v[j], y + r * kWidth + j * kLanes, sizeof(v[j]));
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) partial[i][j] += x[r * kWidth + i] * v[j];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        A lanes[kLanes];
        std::memcpy(lanes, &partial[i][j], sizeof(lanes));
        for (int l = 0; l < kLanes; ++l) sums[i * kWidth + j * kLanes + l] += double(lanes[l]);
      }
  }
}

// Products of kTileRows features of one panel with features [begin, end) of another, and with more
// of the vectors that these lie in: as many at a time as the registers hold. Only here products are
// contracted to FMA, whose bound the sums keep to.
constexpr int kTileRows = 8;

template <class A, int kBytes, int kRows, int kVectors>
MK_INLINE void multiply_tile(const A* x, const A* y, std::int64_t rows, std::int64_t begin,
                             std::int64_t end, double* sums) {
  constexpr std::int64_t kWidth = kPanel<A>, kLanes = kBytes / std::int64_t(sizeof(A));
  for (int i = 0; i < kTileRows; i += kRows)
    for (std::int64_t j = begin / kLanes * kLanes; j < end; j += kVectors * kLanes) {
      double* to = sums + i * kWidth + j;
      const std::int64_t left = (end - j + kLanes - 1) / kLanes;
      if (left >= kVectors)
        multiply<A, kBytes, kRows, kVectors>(x + i, y + j, rows, to);
      else if (kVectors == 3 && left == 2)
        multiply<A, kBytes, kRows, 2>(x + i, y + j, rows, to);
      else
        multiply<A, kBytes, kRows, 1>(x + i, y + j, rows, to);
    }
}

template <class A>
using Tile = void (*)(const A* x, const A* y, std::int64_t rows, std::int64_t begin,
                      std::int64_t end, double* sums);

template <class A>
void tile_of_16_bytes(const A* x, const A* y, std::int64_t rows, std::int64_t begin,
                      std::int64_t end, double* sums) {
  multiply_tile<A, 16, 4, 2>(x, y, rows, begin, end, sums);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MK_FMA(arch) __attribute__((target("arch=" arch), optimize("fp-contract=fast")))

template <class A>
MK_FMA("x86-64-v3")
void tile_of_32_bytes(const A* x, const A* y, std::int64_t rows, std::int64_t begin,
                      std::int64_t end, double* sums) {
  multiply_tile<A, 32, 4, 3>(x, y, rows, begin, end, sums);
}

template <class A>
MK_FMA("x86-64-v4")
void tile_of_64_bytes(const A* x, const A* y, std::int64_t rows, std::int64_t begin,
                      std::int64_t end, double* sums) {
  multiply_tile<A, 64, 8, 3>(x, y, rows, begin, end, sums);
}

template <class A>
Tile<A> best_tile() {
  if (__builtin_cpu_supports("x86-64-v4")) return tile_of_64_bytes<A>;
  if (__builtin_cpu_supports("x86-64-v3")) return tile_of_32_bytes<A>;
  return tile_of_16_bytes<A>;
}
#else
template <class A>
Tile<A> best_tile() {
  return tile_of_16_bytes<A>;
}
#endif

// Row i of a tile into its n products, from feature j on.
MK_CLONES void merge_row(const double* sums, const Center& x, std::int64_t i, const Center& y,
                         std::int64_t j, std::int64_t n, double* products) {
  const double unscale = x.unscale[i], weighted = x.weighted[i], rest = x.weighted_rest[i];
  for (std::int64_t k = 0; k < n; ++k)
    products[k] +=
        sums[k] * unscale * y.unscale[j + k] + (weighted * y.delta[j + k] - rest * y.rest[j + k]);
}

// Products of panel a of x with panel b of y.
template <class A>
void add_panels(const Pairs& args, Tile<A> tile, std::int64_t a, std::int64_t b) {
  constexpr std::int64_t kWidth = kPanel<A>;
  const A* x = static_cast<const A*>(args.x) + a * args.rows * kWidth;
  const A* y = static_cast<const A*>(args.y) + b * args.rows * kWidth;
  double* products = args.products + a * kWidth * args.width_y + b * kWidth;
  const bool diagonal = args.x == args.y && a == b;
  const std::int64_t height = std::min(kWidth, args.width_x - a * kWidth);
  const std::int64_t width = std::min(kWidth, args.width_y - b * kWidth);
  for (std::int64_t i = 0; i < height; i += kTileRows) {
    alignas(64) double sums[kTileRows * kWidth] = {};
    const std::int64_t stop = std::min(i + kTileRows, height);
    for (std::int64_t k = i; k < stop; ++k)  // here by the time that the sums are
      for (std::int64_t j = 0; j < width; j += kLine / sizeof(double))
        __builtin_prefetch(products + k * args.width_y + j);
    tile(x + i, y, args.rows, diagonal ? i : 0, width, sums);
    for (std::int64_t k = i; k < stop; ++k) {
      const std::int64_t begin = diagonal ? k : 0;
      merge_row(sums + (k - i) * kWidth + begin, args.center_x, a * kWidth + k, args.center_y,
                b * kWidth + begin, width - begin, products + k * args.width_y + begin);
    }
  }
}

template <class F>
void with_accumulator(DType dtype, F&& f) {
  if (dtype == DType::f64) return f(double());
  return f(float());
}

}  // namespace

void center(DType dtype, std::int64_t width, std::int64_t n, const double* chunk_mean,
            const double* largest, std::int64_t count, double* mean, const Center& out) {
  const double share = double(n) / double(count + n);
  const int most = dtype == DType::f64 ? 1000 : 126;
  for (std::int64_t i = 0; i < width; ++i) {
    int exponent;
    std::frexp(largest[i], &exponent);
    const double shift = dtype == DType::f64 ? chunk_mean[i] : double(float(chunk_mean[i]));
    exponent = std::clamp(exponent, -most, most);
    out.scale[i] = std::ldexp(1.0, -exponent);
    out.unscale[i] = std::ldexp(1.0, exponent);
    out.shift[i] = shift * out.scale[i];
    out.delta[i] = chunk_mean[i] - mean[i];
    out.weighted[i] = out.delta[i] * (double(count) * share);
    out.rest[i] = chunk_mean[i] - shift;
    out.weighted_rest[i] = double(n) * out.rest[i];
    mean[i] += out.delta[i] * share;
  }
}

std::int64_t panel_count(DType dtype, std::int64_t width) {
  const std::int64_t panel = dtype == DType::f64 ? kPanel<double> : kPanel<float>;
  return (width + panel - 1) / panel;
}

std::int64_t pair_count(const Pairs& args) {
  const std::int64_t a = panel_count(args.dtype, args.width_x);
  return args.x == args.y ? a * (a + 1) / 2 : a * panel_count(args.dtype, args.width_y);
}

// Pairs in the order of y's panels: a panel stays in the cache while x's pass by.
void add_products(const Pairs& args, std::int64_t begin, std::int64_t end) {
  const bool triangle = args.x == args.y;
  const std::int64_t height = panel_count(args.dtype, args.width_x);
  std::int64_t a = begin, b = 0;
  const auto column = [&] { return triangle ? b + 1 : height; };
  for (; a >= column(); ++b) a -= column();
  with_accumulator(args.dtype, [&](auto zero) {
    using A = decltype(zero);
    const Tile<A> tile = best_tile<A>();
    for (std::int64_t pair = begin; pair < end; ++pair) {
      add_panels<A>(args, tile, a, b);
      if (++a == column()) a = 0, ++b;
    }
  });
}

}  // namespace mk
