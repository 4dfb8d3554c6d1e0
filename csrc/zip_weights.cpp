#include "zip_weights.h"

#include <algorithm>

#include "columns.h"
#include "transpose.h"

namespace mk {
namespace {

constexpr std::int64_t kAhead = 1 << 13;  // bytes of each input that are asked for before their use
constexpr std::int64_t kZipBlock = 256;   // columns at a time, in the first-level cache

// ---- the rows of a group ---------------------------------------------------------------------

// How a product enters a sum: as its first term (what it is added to -0), or added to what is
// there.
enum class Enter { first, add };

template <Enter kEnter, class T, class A>
MK_CLONES void scale(const T* x, A factor, A* sum, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const A p = A(widen(x[i])) * factor;
    sum[i] = kEnter == Enter::first ? p : sum[i] + p;
  }
}

// -0, which every number can be added to as it is. Not std::fill: GCC makes a memset of it, whose
// `rep stos` waits for streaming stores before it (rows took 2.3 times as long).
template <class A>
MK_INLINE void clear(A* values, std::int64_t n) {
  typedef A Line __attribute__((vector_size(kLine)));
  for (std::int64_t i = 0; i < n; i += kLine / sizeof(A)) {
    const Line zeros = -Line{};
    std::memcpy(values + i, &zeros, sizeof(zeros));
    asm volatile("");
  }
}

struct Members {
  std::int64_t begin, end;
};

// None for g from `end` on.
Members members(const ZipInput& x, std::int64_t g, std::int64_t end) {
  if (g >= end) return {0, 0};
  return x.starts ? Members{x.starts[g], x.starts[g + 1]} : Members{g, g + 1};
}

template <class T>
const T* row(const ZipInput& x, std::int64_t member, std::int64_t at) {
  return static_cast<const T*>(x.data) + (x.members ? x.members[member] : member) * x.row_stride +
         at;
}

// Columns [at, at + n) of the rows `of` of one model, added up. There is at least one.
template <class T, class A>
void sum_rows(const ZipInput& x, Members of, std::int64_t at, std::int64_t n, A* sum) {
  scale<Enter::first>(row<T>(x, of.begin, at), A(x.factor), sum, n);
  for (std::int64_t k = of.begin + 1; k < of.end; ++k)
    scale<Enter::add>(row<T>(x, k, at), A(x.factor), sum, n);
}

// Rows lie anywhere, so no hardware sees the next ones coming: asks for the same columns of them.
// Inlined, or GCC drops the call: it takes a function that only does this for one without effect.
template <class T>
MK_INLINE void prefetch_rows(const ZipInput& x, Members of, std::int64_t at, std::int64_t n) {
  for (std::int64_t k = of.begin; k < of.end; ++k) {
    const char* from = reinterpret_cast<const char*>(row<T>(x, k, at));
    for (std::int64_t i = 0; i < n * std::int64_t(sizeof(T)); i += kLine)
      __builtin_prefetch(from + i);
  }
}

// ---- the division ----------------------------------------------------------------------------

template <class A>
MK_CLONES void multiply(A* acc, A factor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) acc[i] *= factor;
}

template <class A>
MK_CLONES void divide(A* acc, A divisor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) acc[i] /= divisor;
}

template <class A>
MK_CLONES void divide_each(A* acc, const double* divisors, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) acc[i] /= A(divisors[i]);
}

// The product with an inverse that is exact has the bits of the division.
bool power_of_two(float x) { return (bit_cast<std::uint32_t>(x) & 0x007fffffu) == 0; }
bool power_of_two(double x) { return (bit_cast<std::uint64_t>(x) & 0x000fffffffffffffull) == 0; }

template <class A>
void store(const ZipWeights& args, std::int64_t g, std::int64_t at, std::int64_t n, A* acc) {
  if (!args.row_divisors)
    divide_each(acc, args.column_divisors + at, n);
  else if (const A d = A(args.row_divisors[g]); power_of_two(d))
    multiply(acc, 1 / d, n);
  else
    divide(acc, d, n);
  write_block(args.out, g * args.width + at, n, acc);
}

// ---- columns stay ----------------------------------------------------------------------------

template <class A>
MK_CLONES void add(const A* sum, A* acc, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) acc[i] += sum[i];
}

// A pair of rows and a divisor whose inverse is exact, the usual case, in one go. Asks for the rows
// `next` meanwhile.
template <class T, class A>
MK_CLONES void average(const T* a, const T* b, const T* next_a, const T* next_b, A factor_a,
                       A factor_b, A inverse, T* __restrict out, std::int64_t n) {
  constexpr std::int64_t line = kLine / sizeof(T);
  const auto one = [=](std::int64_t i) {
    const A first = A(widen(a[i])) * factor_a;
    narrow((first + A(widen(b[i])) * factor_b) * inverse, out + i);
  };
  std::int64_t at = 0;
  for (; at + line <= n; at += line) {
    __builtin_prefetch(next_a + at);
    __builtin_prefetch(next_b + at);
    for (std::int64_t i = 0; i < line; ++i) one(at + i);
  }
  for (; at < n; ++at) one(at);
}

// Columns [at, at + n) of row g. `pieces` has those of inputs with positions, one input after the
// other, `apart` elements from each other. Asks for those of row `next` of the other inputs.
template <class T, class A>
void merge_piece(const ZipWeights& args, std::int64_t g, std::int64_t next, std::int64_t end,
                 std::int64_t at, std::int64_t n, const T* pieces, std::int64_t apart) {
  const auto source = [&](const ZipInput& x, Members of, const T** piece) {
    if (!x.positions) return row<T>(x, of.begin, at);
    const T* from = *piece;
    *piece += apart;
    return from;
  };
  if (args.n == 2 && args.row_divisors && power_of_two(A(args.row_divisors[g]))) {
    const ZipInput &a = args.xs[0], &b = args.xs[1];
    const Members of_a = members(a, g, end), of_b = members(b, g, end);
    if (of_a.end - of_a.begin == 1 && of_b.end - of_b.begin == 1) {
      const T *from_a = source(a, of_a, &pieces), *from_b = source(b, of_b, &pieces);
      const auto ahead = [&](const ZipInput& x, const T* from) {
        const Members of = members(x, next, end);
        return x.positions || of.begin == of.end ? from : row<T>(x, of.begin, at);
      };
      T* out = static_cast<T*>(args.out.data) + g * args.width + at;
      alignas(kLine) T rounded[kZipBlock];
      average(from_a, from_b, ahead(a, from_a), ahead(b, from_b), A(a.factor), A(b.factor),
              1 / A(args.row_divisors[g]), args.out.stream ? rounded : out, n);
      if (args.out.stream) stream_copy(out, rounded, std::size_t(n) * sizeof(T));
      return;
    }
  }
  alignas(kLine) A sum[kZipBlock], acc[kZipBlock];
  bool empty = true;
  for (std::int64_t i = 0; i < args.n; ++i) {
    const ZipInput& x = args.xs[i];
    const Members of = members(x, g, end);
    if (!x.positions) prefetch_rows<T>(x, members(x, next, end), at, n);
    if (of.begin == of.end) {
      if (x.positions) pieces += apart;
    } else if (of.end - of.begin > 1) {
      if (empty) clear(acc, kZipBlock);
      sum_rows<T>(x, of, at, n, sum);
      add(sum, acc, n);
      empty = false;
    } else {
      const T* from = source(x, of, &pieces);
      if (empty)
        scale<Enter::first>(from, A(x.factor), acc, n);
      else
        scale<Enter::add>(from, A(x.factor), acc, n);
      empty = false;
    }
  }
  if (empty) clear(acc, kZipBlock);
  store(args, g, at, n, acc);
}

template <class T, class A>
void merge_row(const ZipWeights& args, std::int64_t g, std::int64_t end) {
  const std::int64_t next = g + 1 + kAhead / (args.width * std::int64_t(sizeof(T)));
  for (std::int64_t at = 0; at < args.width; at += kZipBlock)
    merge_piece<T, A>(args, g, next, end, at, std::min(kZipBlock, args.width - at), nullptr, 0);
}

// Rows [g, g + kTogether), of which those before `end` count, where columns of some inputs move,
// all to places of their own.
template <class T, class A>
void merge_moved(const ZipWeights& args, std::int64_t g, std::int64_t end, void* scratch) {
  using Bits = std::conditional_t<sizeof(T) == 2, std::uint16_t, key_t<T>>;
  constexpr int rows = kTogether<Bits>;
  constexpr std::int64_t piece = rows * kZipBlock;
  static_assert(piece * sizeof(T) == kZipPieces, "as zip_weights.h says");
  Bits* const all = static_cast<Bits*>(scratch);
  Bits* words = all;
  const auto find = [&](const ZipInput& x, std::int64_t h, std::int64_t at, const Bits** found) {
    for (int r = 0; r < rows; ++r) {
      const Members of = members(x, h + r, end);
      const T* from = of.begin < of.end ? row<T>(x, of.begin, at) : static_cast<const T*>(x.data);
      found[r] = reinterpret_cast<const Bits*>(from);
    }
  };
  for (std::int64_t i = 0; i < args.n; ++i) {
    const ZipInput& x = args.xs[i];
    if (!x.positions) continue;
    const Bits *sources[rows], *next[rows];
    find(x, g, 0, sources);
    find(x, g + rows, 0, next);
    Ahead ahead(next, rows / 2, args.width, rows / 2);  // the others while columns are gathered
    interleave(sources, args.width, words, ahead);
    words += args.width * rows;
  }
  Bits* const pieces = words;
  for (std::int64_t at = 0; at < args.width; at += kZipBlock) {
    const std::int64_t n = std::min(kZipBlock, args.width - at);
    Bits* to = pieces;
    words = all;
    for (std::int64_t i = 0; i < args.n; ++i) {
      const ZipInput& x = args.xs[i];
      if (!x.positions) continue;
      const Bits* next[rows];
      find(x, g + rows, at, next);
      Ahead ahead(next + rows / 2, rows / 2, n, rows / 2);
      gather_words(words, x.positions + at, to, n, false, ahead);
      words += args.width * rows, to += piece;
    }
    for (int r = 0; r < rows && g + r < end; ++r)
      merge_piece<T, A>(args, g + r, g + r + rows, end, at, n,
                        reinterpret_cast<const T*>(pieces) + r * n, piece);
  }
}

// The same where rows are single elements: no calls for each.
template <class T, class A>
void merge_vector(const ZipWeights& args, std::int64_t begin, std::int64_t end) {
  alignas(64) A acc[kZipBlock];
  for (std::int64_t at = begin; at < end; at += kZipBlock) {
    const std::int64_t n = std::min(kZipBlock, end - at);
    for (std::int64_t j = 0; j < n; ++j) {
      A total = A(-0.0);
      for (std::int64_t i = 0; i < args.n; ++i) {
        const ZipInput& x = args.xs[i];
        const Members of = members(x, at + j, end);
        if (of.begin == of.end) continue;
        A sum = A(widen(*row<T>(x, of.begin, 0))) * A(x.factor);
        for (std::int64_t k = of.begin + 1; k < of.end; ++k)
          sum += A(widen(*row<T>(x, k, 0))) * A(x.factor);
        total += sum;
      }
      acc[j] = total / A(args.row_divisors ? args.row_divisors[at + j] : *args.column_divisors);
    }
    write_block(args.out, at, n, acc);
  }
}

// ---- columns move ----------------------------------------------------------------------------
//
// kRows rows of the result side by side: acc[h] holds column h of all of them in one register, so a
// column of the inputs goes to any other with one addition. acc is all -0 between the rows.

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int kRows = 8;
  typedef std::uint32_t Word __attribute__((vector_size(32)));
  typedef float Values __attribute__((vector_size(32)));
};
template <>
struct Lanes<double> {
  static constexpr int kRows = 4;
  typedef std::uint64_t Word __attribute__((vector_size(32)));
  typedef double Values __attribute__((vector_size(32)));
};

template <class A>
MK_INLINE void add_column(const typename Lanes<A>::Word& column, A* to) {
  typename Lanes<A>::Values total, part;
  std::memcpy(&total, to, sizeof(total));
  std::memcpy(&part, &column, sizeof(part));
  total += part;
  std::memcpy(to, &total, sizeof(total));
}

// Columns [0, n) of rows kZipBlock apart go to columns `targets` of acc.
template <class A>
MK_CLONES void scatter(const A* sums, const std::int64_t* targets, std::int64_t n, A* acc) {
  using Word = typename Lanes<A>::Word;
  constexpr int rows = Lanes<A>::kRows;
  Word words[rows];
  std::int64_t c = 0;
  for (; c + rows <= n; c += rows) {
    for (int r = 0; r < rows; ++r) std::memcpy(&words[r], sums + r * kZipBlock + c, sizeof(Word));
    transpose<Word, rows>(words);
    for (int j = 0; j < rows; ++j) add_column(words[j], acc + targets[c + j] * rows);
  }
  for (; c < n; ++c)
    for (int r = 0; r < rows; ++r) acc[targets[c] * rows + r] += sums[r * kZipBlock + c];
}

// Columns [0, n) of acc, their number rounded up, as rows kZipBlock apart; clears them.
template <class A>
MK_CLONES void gather(A* acc, std::int64_t n, A* sums) {
  using Word = typename Lanes<A>::Word;
  constexpr int rows = Lanes<A>::kRows;
  Word words[rows];
  for (std::int64_t c = 0; c < n; c += rows) {
    std::memcpy(words, acc + c * rows, sizeof(words));
    clear(acc + c * rows, rows * rows);
    transpose<Word, rows>(words);
    for (int r = 0; r < rows; ++r) std::memcpy(sums + r * kZipBlock + c, &words[r], sizeof(Word));
  }
}

template <class T, class A>
void merge_rows(const ZipWeights& args, std::int64_t g, std::int64_t end, A* acc) {
  constexpr int rows = Lanes<A>::kRows;
  alignas(64) A sums[rows * kZipBlock];
  for (std::int64_t i = 0; i < args.n; ++i) {
    const ZipInput& x = args.xs[i];
    for (std::int64_t at = 0; at < x.width; at += kZipBlock) {
      const std::int64_t n = std::min(kZipBlock, x.width - at);
      for (int r = 0; r < rows; ++r) {
        A* sum = sums + r * kZipBlock;
        const Members of = members(x, g + r, end);
        prefetch_rows<T>(x, members(x, g + rows + r, end), at, n);
        if (of.begin < of.end)
          sum_rows<T>(x, of, at, n, sum);
        else
          clear(sum, kZipBlock);
      }
      scatter(sums, x.targets + at, n, acc);
    }
  }
  for (std::int64_t at = 0; at < args.width; at += kZipBlock) {
    const std::int64_t n = std::min(kZipBlock, args.width - at);
    gather(acc + at * rows, n, sums);
    for (int r = 0; r < rows && g + r < end; ++r) store(args, g + r, at, n, sums + r * kZipBlock);
  }
}

}  // namespace

void zip_weights(const ZipWeights& args, std::int64_t begin, std::int64_t end, void* scratch) {
  with_type(args.out.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = sum_t<T>;
    if (args.xs[0].targets) {
      A* acc = static_cast<A*>(scratch);
      clear(acc, (args.width + kZipRows - 1) / kZipRows * kZipRows * Lanes<A>::kRows);
      for (std::int64_t g = begin; g < end; g += Lanes<A>::kRows) merge_rows<T>(args, g, end, acc);
    } else if (std::any_of(args.xs, args.xs + args.n, [](auto& x) { return x.positions; })) {
      for (std::int64_t g = begin; g < end; g += 16 / std::int64_t(sizeof(T)))
        merge_moved<T, A>(args, g, end, scratch);
    } else if (args.width == 1) {
      merge_vector<T, A>(args, begin, end);
    } else {
      for (std::int64_t g = begin; g < end; ++g) merge_row<T, A>(args, g, end);
    }
    if (args.out.stream) stream_fence();
  });
}

std::int64_t group_members(const std::int64_t* labels, std::int64_t n, std::int64_t groups,
                           std::int64_t* starts, std::int64_t* members) {
  std::fill(starts, starts + groups + 1, 0);
  for (std::int64_t r = 0; r < n; ++r) ++starts[labels[r] + 1];
  const std::int64_t largest = *std::max_element(starts, starts + groups + 1);
  for (std::int64_t g = 0; g < groups; ++g) starts[g + 1] += starts[g];
  for (std::int64_t r = 0; r < n; ++r) members[starts[labels[r]]++] = r;
  std::copy_backward(starts, starts + groups, starts + groups + 1);  // each was moved to its end
  starts[0] = 0;
  return largest;
}

}  // namespace mk
