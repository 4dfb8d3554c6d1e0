#include "covariance.h"

#include <algorithm>
#include <cmath>

namespace mk {
namespace {

constexpr std::int64_t kColumns = 512;  // of a block of column_means: its sums stay in L1
constexpr std::int64_t kGroup = 8;      // rows that are packed before the next panel

template <class A>
constexpr std::int64_t kPanel = kPanelBytes / std::int64_t(sizeof(A));

// ---- reading rows ------------------------------------------------------------------------------

// The same bits, or 0 in the place of NaN and infinities.
template <bool kZero, class T>
MK_INLINE acc_t<T> read(T x) {
  const acc_t<T> v = widen(x);
  if constexpr (!kZero) return v;
  constexpr auto kInfinity = sizeof(v) == 8 ? key_t<T>(kNanKey64 - 1) : key_t<T>(kNanKey32 - 1);
  return magnitude_bits(v) < kInfinity ? v : acc_t<T>(0);
}

// Features [column, column + n) of rows [begin, begin + rows), as rows at `offsets` from the result
// on: where they lie, or gathered row after row into `scratch`.
template <class T>
const T* gather(const Rows& x, std::int64_t begin, std::int64_t rows, std::int64_t column,
                std::int64_t n, T* scratch, std::int64_t* offsets) {
  const T* data = static_cast<const T*>(x.data);
  if (x.stride == 1) {
    std::copy(x.offsets + begin, x.offsets + begin + rows, offsets);
    return data + column;
  }
  for (std::int64_t r = 0; r < rows; ++r) offsets[r] = r * n;
  for (std::int64_t c = 0; c < n; ++c)
    for (std::int64_t r = 0; r < rows; ++r)
      scratch[r * n + c] = data[x.offsets[begin + r] + (column + c) * x.stride];
  return scratch;
}

// f(std::bool_constant<x.zero>{}, a null pointer of the element type).
template <class F>
void with_rows(const Rows& x, F&& f) {
  with_type(x.dtype, [&](auto* tag) {
    if (x.zero)
      f(std::true_type{}, tag);
    else
      f(std::false_type{}, tag);
  });
}

// ---- means -------------------------------------------------------------------------------------

template <bool kZero, class T>
MK_CLONES void add_row(const T* x, const double* first, std::int64_t n, double* sums,
                       key_t<T>* largest) {
  for (std::int64_t i = 0; i < n; ++i) {
    const acc_t<T> v = read<kZero>(x[i]);
    const key_t<T> magnitude = magnitude_bits(v);
    sums[i] += double(v) - first[i];
    largest[i] = magnitude > largest[i] ? magnitude : largest[i];
  }
}

template <bool kZero, class T>
bool means(const Rows& x, std::int64_t begin, std::int64_t end, double* mean, double* largest) {
  alignas(64) T scratch[kGroup * kColumns];
  alignas(64) double first[kColumns], sums[kColumns];
  alignas(64) key_t<T> magnitudes[kColumns];
  std::int64_t offsets[kGroup];
  bool finite = true;
  for (std::int64_t column = 0; column < x.width; column += kColumns) {
    const std::int64_t n = std::min(kColumns, x.width - column);
    const T* row = gather(x, begin, 1, column, n, scratch, offsets) + offsets[0];
    for (std::int64_t c = 0; c < n; ++c) first[c] = double(read<kZero>(row[c]));
    std::fill(sums, sums + n, 0.0);
    std::fill(magnitudes, magnitudes + n, key_t<T>(0));
    for (std::int64_t r = begin; r < end; r += kGroup) {
      const std::int64_t rows = std::min(kGroup, end - r);
      const T* from = gather(x, r, rows, column, n, scratch, offsets);
      for (std::int64_t k = 0; k < rows; ++k)
        add_row<kZero>(from + offsets[k], first, n, sums, magnitudes);
    }
    for (std::int64_t c = 0; c < n; ++c) {
      mean[column + c] = first[c] + sums[c] / double(end - begin);
      largest[column + c] = double(bit_cast<acc_t<T>>(magnitudes[c]));
      finite &= std::isfinite(largest[column + c]);
    }
  }
  return finite;
}

// ---- packing -----------------------------------------------------------------------------------

template <bool kZero, class T>
MK_CLONES void pack_rows(const T* x, const std::int64_t* offsets, std::int64_t rows,
                         const acc_t<T>* shift, const acc_t<T>* scale, std::int64_t n,
                         acc_t<T>* out) {
  constexpr std::int64_t kWidth = kPanel<acc_t<T>>;
  for (std::int64_t r = 0; r < rows; ++r, out += kWidth) {
    const T* row = x + offsets[r];
    if (n == kWidth) {
      for (std::int64_t c = 0; c < kWidth; ++c) out[c] = read<kZero>(row[c]) * scale[c] - shift[c];
    } else {
      for (std::int64_t c = 0; c < n; ++c) out[c] = read<kZero>(row[c]) * scale[c] - shift[c];
      for (std::int64_t c = n; c < kWidth; ++c)
        out[c] = 0;  // what was there may be subnormal: slow
    }
  }
}

template <class A>
MK_CLONES void add_squares(const A* v, std::int64_t rows, const double* unscale, double* squares) {
  constexpr std::int64_t kWidth = kPanel<A>;
  for (std::int64_t r = 0; r < rows; ++r, v += kWidth)
    for (std::int64_t c = 0; c < kWidth; ++c) {
      const double d = double(v[c]) * unscale[c];
      squares[c] += d * d;
    }
}

template <bool kZero, class T>
void pack_panels(const Rows& x, std::int64_t begin, std::int64_t end, const Center& center,
                 std::int64_t first, std::int64_t last, void* panels, double* squares) {
  using A = acc_t<T>;
  constexpr std::int64_t kWidth = kPanel<A>;
  alignas(64) T scratch[kGroup * kWidth];
  std::int64_t offsets[kGroup];
  for (std::int64_t r = begin; r < end; r += kGroup) {
    const std::int64_t rows = std::min(kGroup, end - r);
    for (std::int64_t p = first; p < last; ++p) {
      const std::int64_t column = p * kWidth, n = std::min(kWidth, x.width - column);
      alignas(64) A shift[kWidth], scale[kWidth];
      for (std::int64_t c = 0; c < n; ++c) {
        shift[c] = A(center.shift[column + c]);
        scale[c] = A(center.scale[column + c]);
      }
      A* out = static_cast<A*>(panels) + (p * (end - begin) + r - begin) * kWidth;
      const T* from = gather(x, r, rows, column, n, scratch, offsets);
      pack_rows<kZero>(from, offsets, rows, shift, scale, n, out);
      if (squares) {
        alignas(64) double unscale[kWidth] = {}, sums[kWidth] = {};
        for (std::int64_t c = 0; c < n; ++c) unscale[c] = 1 / center.scale[column + c];
        add_squares(out, rows, unscale, sums);
        for (std::int64_t c = 0; c < n; ++c) squares[column + c] += sums[c];
      }
    }
  }
  if (!squares) return;
  const std::int64_t stop = std::min(x.width, last * kWidth);
  for (std::int64_t i = first * kWidth; i < stop; ++i)
    squares[i] += center.weighted[i] * center.delta[i] - center.weighted_rest[i] * center.rest[i];
}

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

// All products of kTileRows features of one panel with another panel: as many at a time as the
// registers hold. Only here products are contracted to FMA, whose bound the sums keep to.
constexpr int kTileRows = 8;

template <class A, int kBytes, int kRows, int kVectors>
MK_INLINE void multiply_tile(const A* x, const A* y, std::int64_t rows, double* sums) {
  constexpr std::int64_t kWidth = kPanel<A>, kColumns = kVectors * kBytes / int(sizeof(A));
  for (int i = 0; i < kTileRows; i += kRows)
    for (std::int64_t j = 0; j < kWidth; j += kColumns)
      multiply<A, kBytes, kRows, kVectors>(x + i, y + j, rows, sums + i * kWidth + j);
}

template <class A>
using Tile = void (*)(const A* x, const A* y, std::int64_t rows, double* sums);

template <class A>
void tile_of_16_bytes(const A* x, const A* y, std::int64_t rows, double* sums) {
  multiply_tile<A, 16, 4, 2>(x, y, rows, sums);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MK_FMA(arch) __attribute__((target("arch=" arch), optimize("fp-contract=fast")))

template <class A>
MK_FMA("x86-64-v3")
void tile_of_32_bytes(const A* x, const A* y, std::int64_t rows, double* sums) {
  multiply_tile<A, 32, 4, 3>(x, y, rows, sums);
}

template <class A>
MK_FMA("x86-64-v4")
void tile_of_64_bytes(const A* x, const A* y, std::int64_t rows, double* sums) {
  multiply_tile<A, 64, 8, 3>(x, y, rows, sums);
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
  const double unscale = 1 / x.scale[i], weighted = x.weighted[i], rest = x.weighted_rest[i];
  for (std::int64_t k = 0; k < n; ++k)
    products[k] +=
        sums[k] * unscale / y.scale[j + k] + (weighted * y.delta[j + k] - rest * y.rest[j + k]);
}

// Products of panel a of x with panel b of y.
template <class A>
void add_panels(const Pairs& args, Tile<A> tile, std::int64_t a, std::int64_t b) {
  constexpr std::int64_t kWidth = kPanel<A>;
  const A* x = static_cast<const A*>(args.x) + a * args.rows * kWidth;
  const A* y = static_cast<const A*>(args.y) + b * args.rows * kWidth;
  const bool triangle = args.x == args.y;
  const std::int64_t last = std::min(args.width_y, (b + 1) * kWidth);
  const std::int64_t height = std::min(kWidth, args.width_x - a * kWidth);
  for (std::int64_t i = 0; i < height; i += kTileRows) {
    alignas(64) double sums[kTileRows * kWidth] = {};
    tile(x + i, y, args.rows, sums);
    for (std::int64_t k = 0; k < std::min<std::int64_t>(kTileRows, height - i); ++k) {
      const std::int64_t row = a * kWidth + i + k;
      const std::int64_t begin = triangle ? std::max(row, b * kWidth) : b * kWidth;
      if (begin < last)
        merge_row(sums + k * kWidth + begin - b * kWidth, args.center_x, row, args.center_y, begin,
                  last - begin, args.products + row * args.width_y + begin);
    }
  }
}

template <class F>
void with_accumulator(DType dtype, F&& f) {
  if (dtype == DType::f64) return f(double());
  return f(float());
}

}  // namespace

bool column_means(const Rows& x, std::int64_t begin, std::int64_t end, double* mean,
                  double* largest) {
  bool finite = true;
  with_rows(x, [&](auto zero, auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    finite = means<zero, T>(x, begin, end, mean, largest);
  });
  return finite;
}

void center(DType dtype, std::int64_t width, std::int64_t n, const double* chunk_mean,
            const double* largest, std::int64_t count, double* mean, const Center& out) {
  const double share = double(n) / double(count + n);
  const int most = dtype == DType::f64 ? 1000 : 126;
  for (std::int64_t i = 0; i < width; ++i) {
    int exponent;
    std::frexp(largest[i], &exponent);
    const double shift = dtype == DType::f64 ? chunk_mean[i] : double(float(chunk_mean[i]));
    out.scale[i] = std::ldexp(1.0, -std::clamp(exponent, -most, most));
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

void pack(const Rows& x, std::int64_t begin, std::int64_t end, const Center& center,
          std::int64_t first, std::int64_t last, void* panels, double* squares) {
  with_rows(x, [&](auto zero, auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    pack_panels<zero, T>(x, begin, end, center, first, last, panels, squares);
  });
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
