#include "zip_weights.h"

#include <algorithm>

#include "transpose.h"

namespace mk {
namespace {

constexpr std::int64_t kZipBlock = 128;  // columns at a time, in the first-level cache

// ---- one row of a group ----------------------------------------------------------------------

template <bool First, class T, class A>
MK_CLONES void scale(const T* x, A factor, A* sum, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const A p = A(widen(x[i])) * factor;
    sum[i] = First ? p : sum[i] + p;
  }
}

// Columns [at, at + n) of one model, added over the rows of group g. False: it has none.
template <class T, class A>
bool sum_rows(const ZipInput& x, std::int64_t g, std::int64_t at, std::int64_t n, A* sum) {
  const T* data = static_cast<const T*>(x.data) + at;
  const std::int64_t first = x.starts ? x.starts[g] : 0, last = x.starts ? x.starts[g + 1] : 1;
  for (std::int64_t k = first; k < last; ++k) {
    const T* row = data + (x.starts ? x.members[k] : g) * x.row_stride;
    if (k == first)
      scale<true>(row, A(x.factor), sum, n);
    else
      scale<false>(row, A(x.factor), sum, n);
  }
  return first < last;
}

// ---- columns stay ----------------------------------------------------------------------------

template <class A>
MK_CLONES void add(const A* sum, A* acc, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) acc[i] += sum[i];
}

template <class A>
MK_CLONES void divide(A* acc, A divisor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) acc[i] /= divisor;
}

template <class A>
MK_CLONES void divide_each(A* acc, const double* divisors, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) acc[i] /= A(divisors[i]);
}

template <class A>
void store(const ZipWeights& args, std::int64_t g, std::int64_t at, std::int64_t n, A* acc) {
  if (args.row_divisors)
    divide(acc, A(args.row_divisors[g]), n);
  else
    divide_each(acc, args.column_divisors + at, n);
  write_block(args.out, g * args.width + at, n, acc);
}

template <class T, class A>
void merge_row(const ZipWeights& args, std::int64_t g) {
  alignas(64) A sum[kZipBlock], acc[kZipBlock];
  for (std::int64_t at = 0; at < args.width; at += kZipBlock) {
    const std::int64_t n = std::min(kZipBlock, args.width - at);
    std::fill(acc, acc + n, A(0));
    for (std::int64_t i = 0; i < args.n; ++i)
      if (sum_rows<T>(args.xs[i], g, at, n, sum)) add(sum, acc, n);
    store(args, g, at, n, acc);
  }
}

// ---- columns move ----------------------------------------------------------------------------
//
// kZipRows rows of the result side by side: acc[h] holds column h of all of them, so a column of
// the inputs goes to any other with one addition of vectors.

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  typedef std::uint32_t Word __attribute__((vector_size(4 * kZipRows)));
  typedef float Values __attribute__((vector_size(4 * kZipRows)));
};
template <>
struct Lanes<double> {
  typedef std::uint64_t Word __attribute__((vector_size(8 * kZipRows)));
  typedef double Values __attribute__((vector_size(8 * kZipRows)));
};

// Columns [0, n) of `sums`, kZipBlock apart, to the columns `targets` of acc.
template <class A>
MK_CLONES void scatter(const A* sums, const std::int64_t* targets, std::int64_t n, A* acc) {
  typename Lanes<A>::Word words[kZipRows];
  for (std::int64_t c = 0; c < n; c += kZipRows) {
    for (int r = 0; r < kZipRows; ++r)
      std::memcpy(&words[r], sums + r * kZipBlock + c, sizeof(words[r]));
    transpose<typename Lanes<A>::Word, kZipRows>(words);
    const int left = int(std::min<std::int64_t>(kZipRows, n - c));
    for (int j = 0; j < left; ++j) {
      A* to = acc + targets[c + j] * kZipRows;
      typename Lanes<A>::Values total, part;
      std::memcpy(&total, to, sizeof(total));
      std::memcpy(&part, &words[j], sizeof(part));
      total += part;
      std::memcpy(to, &total, sizeof(total));
    }
  }
}

// Columns [0, n) of acc as rows, kZipBlock apart.
template <class A>
MK_CLONES void gather(const A* acc, std::int64_t n, A* rows) {
  typename Lanes<A>::Word words[kZipRows];
  for (std::int64_t c = 0; c < n; c += kZipRows) {
    std::memcpy(words, acc + c * kZipRows, sizeof(words));
    transpose<typename Lanes<A>::Word, kZipRows>(words);
    for (int r = 0; r < kZipRows; ++r)
      std::memcpy(rows + r * kZipBlock + c, &words[r], sizeof(words[r]));
  }
}

template <class T, class A>
void merge_rows(const ZipWeights& args, std::int64_t g, int rows, A* acc) {
  alignas(64) A sums[kZipRows * kZipBlock];
  std::fill(acc, acc + args.width * kZipRows, A(0));
  for (std::int64_t i = 0; i < args.n; ++i) {
    const ZipInput& x = args.xs[i];
    for (std::int64_t at = 0; at < x.width; at += kZipBlock) {
      const std::int64_t n = std::min(kZipBlock, x.width - at);
      for (int r = 0; r < kZipRows; ++r) {
        A* sum = sums + r * kZipBlock;
        if (r >= rows || !sum_rows<T>(x, g + r, at, n, sum)) std::fill(sum, sum + n, A(0));
      }
      scatter(sums, x.targets + at, n, acc);
    }
  }
  for (std::int64_t at = 0; at < args.width; at += kZipBlock) {
    const std::int64_t n = std::min(kZipBlock, args.width - at);
    gather(acc + at * kZipRows, n, sums);
    for (int r = 0; r < rows; ++r) store(args, g + r, at, n, sums + r * kZipBlock);
  }
}

}  // namespace

void zip_weights(const ZipWeights& args, std::int64_t begin, std::int64_t end, void* scratch) {
  with_type(args.out.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = sum_t<T>;
    if (args.xs[0].targets)
      for (std::int64_t g = begin; g < end; g += kZipRows)
        merge_rows<T>(args, g, int(std::min<std::int64_t>(kZipRows, end - g)),
                      static_cast<A*>(scratch));
    else
      for (std::int64_t g = begin; g < end; ++g) merge_row<T, A>(args, g);
    if (args.out.stream) stream_fence();
  });
}

void group_members(const std::int64_t* labels, std::int64_t n, std::int64_t groups,
                   std::int64_t* starts, std::int64_t* members) {
  std::fill(starts, starts + groups + 1, 0);
  for (std::int64_t r = 0; r < n; ++r) ++starts[labels[r] + 1];
  for (std::int64_t g = 0; g < groups; ++g) starts[g + 1] += starts[g];
  for (std::int64_t r = 0; r < n; ++r) members[starts[labels[r]]++] = r;
  std::copy_backward(starts, starts + groups, starts + groups + 1);  // each was moved to its end
  starts[0] = 0;
}

}  // namespace mk
