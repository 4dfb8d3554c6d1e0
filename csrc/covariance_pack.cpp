// The first two steps of covariance.h: rows are read, measured, and packed.
#include <algorithm>
#include <cmath>

#include "covariance.h"
#include "transpose.h"

namespace mk {
namespace {

constexpr std::int64_t kColumns = 512;  // of a block of column_means: its sums stay in L1
constexpr std::int64_t kApart = 64;     // of one whose features are apart, each a stream of its own
constexpr int kGroup = 8;               // rows that are read together
constexpr std::size_t kAhead = 2 * kLine;

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

void pack(const Rows& x, std::int64_t begin, std::int64_t end, const Center& center,
          std::int64_t first, std::int64_t last, void* panels, double* squares) {
  with_rows(x, [&](auto zero, auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    pack_panels<zero, T>(x, begin, end, center, first, last, panels, squares);
  });
}

}  // namespace mk
