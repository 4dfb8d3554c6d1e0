#include "covariance.h"

#include <algorithm>
#include <cmath>

#include "transpose.h"

namespace mk {
namespace {

constexpr std::int64_t kColumns = 512;  // of a block of column_means: its sums stay in L1
constexpr std::int64_t kApart = 64;     // of one whose features are apart, each a stream of its own
constexpr int kGroup = 8;               // rows that are read together
constexpr std::size_t kAhead = 2 * kLine;

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

// A few rows of some features: row r begins at data + offsets[r].
template <class T>
struct Group {
  const T* data;
  std::int64_t rows, offsets[kGroup];
};

// kGroup rows of n features, where rows are next to each other and features `stride` apart: rows of
// n elements in `out`. So many short runs are no stream to the hardware: without a call for what
// comes next, features of 200 rows took twice as long.
template <class T>
MK_CLONES void turn(const T* x, std::int64_t stride, std::int64_t n, T* out) {
  using Bits = std::conditional_t<sizeof(T) == 2, std::uint16_t, key_t<T>>;
  typedef Bits Word __attribute__((vector_size(kGroup * sizeof(T))));
  std::int64_t c = 0;
  for (; c + kGroup <= n; c += kGroup) {
    Word words[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      const T* from = x + (c + i) * stride;
      __builtin_prefetch(from + kAhead / sizeof(T));
      std::memcpy(&words[i], from, sizeof(Word));
    }
    transpose<Word, kGroup>(words);
    for (int r = 0; r < kGroup; ++r) std::memcpy(out + r * n + c, &words[r], sizeof(Word));
  }
  for (; c < n; ++c)
    for (int r = 0; r < kGroup; ++r) out[r * n + c] = x[r + c * stride];
}

// Rows from `begin` on, of features [column, column + n): where they lie, or one after the other in
// `scratch`, which has room for kGroup. As many as that, but for the last ones, and for those that
// end a run of rows that are next to each other: they are turned once more with some before them.
template <class T>
Group<T> gather(const Rows& x, std::int64_t begin, std::int64_t end, std::int64_t column,
                std::int64_t n, T* scratch) {
  const T* data = static_cast<const T*>(x.data) + column * x.stride;
  const std::int64_t* offsets = x.offsets + begin;
  Group<T> out = {data, std::min<std::int64_t>(kGroup, end - begin), {}};
  if (x.stride == 1) {
    std::copy(offsets, offsets + out.rows, out.offsets);
    return out;
  }
  out.data = scratch;
  for (std::int64_t r = 0; r < out.rows; ++r) out.offsets[r] = r * n;
  std::int64_t run = 1;
  while (run < out.rows && offsets[run] == offsets[0] + run) ++run;
  const std::int64_t first = offsets[run - 1] - (kGroup - 1);
  if (begin + run >= kGroup && offsets[run - kGroup] == first) {
    turn(data + first, x.stride, n, scratch);
    out.data += (kGroup - run) * n;
    out.rows = run;
    return out;
  }
  for (std::int64_t c = 0; c < n; ++c)
    for (std::int64_t r = 0; r < out.rows; ++r)
      scratch[r * n + c] = data[offsets[r] + c * x.stride];
  return out;
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
  alignas(64) T scratch[kGroup * kApart];
  alignas(64) double first[kColumns], sums[kColumns];
  alignas(64) key_t<T> magnitudes[kColumns];
  bool finite = true;
  const std::int64_t step = x.stride == 1 ? kColumns : kApart;
  for (std::int64_t column = 0; column < x.width; column += step) {
    const std::int64_t n = std::min(step, x.width - column);
    const Group<T> row = gather(x, begin, begin + 1, column, n, scratch);
    for (std::int64_t c = 0; c < n; ++c)
      first[c] = double(read<kZero>(row.data[row.offsets[0] + c]));
    std::fill(sums, sums + n, 0.0);
    std::fill(magnitudes, magnitudes + n, key_t<T>(0));
    for (std::int64_t r = begin; r < end;) {
      const Group<T> group = gather(x, r, end, column, n, scratch);
      for (std::int64_t k = 0; k < group.rows; ++k)
        add_row<kZero>(group.data + group.offsets[k], first, n, sums, magnitudes);
      r += group.rows;
    }
    for (std::int64_t c = 0; c < n; ++c) {
      const std::int64_t i = x.first + column + c;
      mean[i] = first[c] + sums[c] / double(end - begin);
      largest[i] = double(bit_cast<acc_t<T>>(magnitudes[c]));
      finite &= std::isfinite(largest[i]);
    }
  }
  return finite;
}

// ---- packing -----------------------------------------------------------------------------------

template <bool kZero, class T>
MK_CLONES void pack_rows(const T* x, const std::int64_t* offsets, std::int64_t rows,
                         const acc_t<T>* shift, const acc_t<T>* scale, std::int64_t n,
                         std::int64_t zeros, acc_t<T>* out) {
  constexpr std::int64_t kWidth = kPanel<acc_t<T>>;
  for (std::int64_t r = 0; r < rows; ++r, out += kWidth) {
    const T* row = x + offsets[r];
    if (n == kWidth) {
      for (std::int64_t c = 0; c < kWidth; ++c) out[c] = read<kZero>(row[c]) * scale[c] - shift[c];
    } else {
      for (std::int64_t c = 0; c < n; ++c) out[c] = read<kZero>(row[c]) * scale[c] - shift[c];
      for (std::int64_t c = n; c < n + zeros; ++c)
        out[c] = 0;  // what was there may be subnormal: slow
    }
  }
}

// Features [i, stop) of a side that lie in one panel, from `out` on.
template <bool kZero, class T>
void pack_features(const Rows& x, std::int64_t begin, std::int64_t end, const Center& center,
                   std::int64_t i, std::int64_t stop, acc_t<T>* out) {
  using A = acc_t<T>;
  constexpr std::int64_t kWidth = kPanel<A>;
  alignas(64) T scratch[kGroup * kWidth];
  alignas(64) A shift[kWidth], scale[kWidth];
  const std::int64_t n = stop - i, zeros = stop == x.side ? kWidth - 1 - (stop - 1) % kWidth : 0;
  for (std::int64_t c = 0; c < n; ++c) {
    shift[c] = A(center.shift[i + c]);
    scale[c] = A(center.scale[i + c]);
  }
  for (std::int64_t r = begin; r < end;) {
    const Group<T> group = gather(x, r, end, i - x.first, n, scratch);
    pack_rows<kZero>(group.data, group.offsets, group.rows, shift, scale, n, zeros, out);
    out += group.rows * kWidth;
    r += group.rows;
  }
}

template <class A>
MK_CLONES void add_squares(const A* v, std::int64_t rows, std::int64_t n, const double* unscale,
                           double* sums) {
  for (std::int64_t r = 0; r < rows; ++r, v += kPanel<A>)
    for (std::int64_t c = 0; c < n; ++c) {
      const double d = double(v[c]) * unscale[c];
      sums[c] += d * d;
    }
}

template <bool kZero, class T>
void pack_panels(const Rows& x, std::int64_t begin, std::int64_t end, const Center& center,
                 std::int64_t first, std::int64_t last, void* panels, double* squares) {
  using A = acc_t<T>;
  constexpr std::int64_t kWidth = kPanel<A>;
  const std::int64_t rows = end - begin;
  // f(first feature, the one after the last, where they lie) for what each panel has of them.
  const auto each = [&](auto&& f) {
    for (std::int64_t p = first; p < last; ++p) {
      const std::int64_t i = std::max(x.first, p * kWidth);
      const std::int64_t stop = std::min(x.first + x.width, (p + 1) * kWidth);
      if (i < stop) f(i, stop, static_cast<A*>(panels) + p * rows * kWidth + (i - p * kWidth));
    }
  };
  // Rows of features that are next to each other are read once; features that are apart, one panel
  // after the other.
  const std::int64_t step = x.stride == 1 ? kGroup : rows;
  for (std::int64_t r = begin; r < end; r += step)
    each([&](std::int64_t i, std::int64_t stop, A* out) {
      const std::int64_t until = std::min(r + step, end);
      pack_features<kZero, T>(x, r, until, center, i, stop, out + (r - begin) * kWidth);
    });
  if (!squares) return;
  each([&](std::int64_t i, std::int64_t stop, const A* v) {
    alignas(64) double sums[kWidth] = {};
    add_squares(v, rows, stop - i, center.unscale + i, sums);
    for (std::int64_t c = 0; i < stop; ++i, ++c)
      squares[i] += sums[c] + (center.weighted[i] * center.delta[i] -
                               center.weighted_rest[i] * center.rest[i]);
  });
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
