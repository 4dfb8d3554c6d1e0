#include "permute.h"

#include <algorithm>

#include "transpose.h"

namespace mk {
namespace {

struct Bits128 {
  std::uint64_t low, high;
};

// ---- several rows under one index ------------------------------------------------------------
//
// A random 2-byte load per element cannot keep up with memory. So kLanes rows are interleaved
// into 16-byte words, one word per column; one load then fetches a column of all of them, and a
// transpose of kLanes such words gives kLanes pieces of result rows.

template <class T>
struct Words {
  static constexpr int kLanes = 16 / sizeof(T);
  typedef T Word __attribute__((vector_size(16)));
};

// Asks for the same part of the rows `next` meanwhile.
template <class T>
void interleave(const T* const* rows, const T* const* next, std::int64_t size, T* words) {
  using W = typename Words<T>::Word;
  constexpr int n = Words<T>::kLanes;
  constexpr std::int64_t line = kLine / sizeof(T);
  std::int64_t j = 0;
  for (; j + n <= size; j += n) {
    W block[n];
    if (j % line == 0)
      for (int r = 0; r < n; ++r) __builtin_prefetch(next[r] + j);
    for (int r = 0; r < n; ++r) std::memcpy(&block[r], rows[r] + j, sizeof(W));
    transpose<W, n>(block);
    std::memcpy(words + j * n, block, sizeof(block));
  }
  for (; j < size; ++j)
    for (int r = 0; r < n; ++r) words[j * n + r] = rows[r][j];
}

template <class T>
void gather_words(const T* words, const std::int32_t* positions, T* out, std::int64_t width,
                  bool stream) {
  using W = typename Words<T>::Word;
  constexpr int n = Words<T>::kLanes, step = kLine / sizeof(T);
  const auto misaligned = reinterpret_cast<std::uintptr_t>(out) | std::uintptr_t(width) * sizeof(T);
  stream = stream && misaligned % kLine == 0;
  std::int64_t j = 0;
  for (; j + step <= width; j += step) {  // a cache line of every row at a time
    alignas(kLine) T piece[n][step];
    for (int part = 0; part < step; part += n) {
      W block[n];
      for (int c = 0; c < n; ++c)
        std::memcpy(&block[c], words + std::int64_t(positions[j + part + c]) * n, sizeof(W));
      transpose<W, n>(block);
      for (int r = 0; r < n; ++r) std::memcpy(&piece[r][part], &block[r], sizeof(W));
    }
    for (int r = 0; r < n; ++r)
      if (stream)
        stream_line(out + r * width + j, piece[r]);
      else
        std::memcpy(out + r * width + j, piece[r], kLine);
  }
  for (; j < width; ++j)
    for (int r = 0; r < n; ++r) out[r * width + j] = words[std::int64_t(positions[j]) * n + r];
}

// ---- one row ---------------------------------------------------------------------------------

// Bytes from which on streaming a row pays, even if it shares cache lines with its neighbours.
constexpr std::size_t kStreamedRow = 1 << 15;

// What is asked for ahead. Rows lie anywhere, so no hardware sees the next one coming.
constexpr std::int64_t kAhead = 1 << 13;
constexpr std::size_t kStep = 1 << 10;

void copy_row(void* to, const void* from, const void* next, std::size_t bytes, bool stream) {
  char* out = static_cast<char*>(to);
  const char *x = static_cast<const char*>(from), *ahead = static_cast<const char*>(next);
  const bool whole_lines = (reinterpret_cast<std::uintptr_t>(out) | bytes) % kLine == 0;
  stream = stream && (whole_lines || bytes >= kStreamedRow);
  for (std::size_t at = 0, n; at < bytes; at += n) {
    n = std::min(kStep, bytes - at);
    for (std::size_t i = 0; i < n; i += kLine) __builtin_prefetch(ahead + at + i);
    if (stream)
      stream_copy(out + at, x + at, n);
    else
      std::memcpy(out + at, x + at, n);
  }
}

template <class T>
void gather_row(const Permute& args, const T* x, const T* next, T* out) {
  const Axis& last = args.axes[args.ndim - 1];
  if (args.positions)
    for (std::int64_t j = 0; j < last.size; ++j) out[j] = x[args.positions[j]];
  else if (last.offsets)
    for (std::int64_t j = 0; j < last.size; ++j) out[j] = x[last.offsets[j]];
  else if (last.stride == 1)
    copy_row(out, x, next, std::size_t(last.size) * sizeof(T), args.stream);
  else
    for (std::int64_t j = 0; j < last.size; ++j) out[j] = x[j * last.stride];
}

// ---- all rows --------------------------------------------------------------------------------

// Where the source of each result row begins.
class Rows {
 public:
  Rows(const Permute& args, std::int64_t begin) : args_(args), outer_(args.ndim - 1) {
    for (int d = outer_ - 1; d >= 0; --d) {
      index_[d] = begin % args.axes[d].size;
      begin /= args.axes[d].size;
    }
    sum_from(0);
  }
  std::int64_t offset() const { return partial_[outer_]; }
  void next() {
    int d = outer_ - 1;
    for (; d >= 0; --d) {
      if (++index_[d] < args_.axes[d].size) break;
      index_[d] = 0;
    }
    sum_from(d < 0 ? 0 : d);
  }

 private:
  void sum_from(int d) {
    for (; d < outer_; ++d) {
      const Axis& axis = args_.axes[d];
      partial_[d + 1] =
          partial_[d] + (axis.offsets ? axis.offsets[index_[d]] : index_[d] * axis.stride);
    }
  }

  const Permute& args_;
  int outer_;
  std::int64_t index_[kMaxDims] = {};
  std::int64_t partial_[kMaxDims + 1] = {};  // partial_[d]: offset of the axes before d
};

template <class T>
void run(const Permute& args, std::int64_t begin, std::int64_t end, void* scratch) {
  const std::int64_t width = args.axes[args.ndim - 1].size;
  const T* x = static_cast<const T*>(args.x);
  T* out = static_cast<T*>(args.out) + begin * width;
  std::int64_t row = begin;
  if constexpr (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8) {
    constexpr int n = Words<T>::kLanes;
    const bool worthwhile = args.positions && 2 * width >= args.row_size;
    if (worthwhile && row + n <= end) {
      Rows ahead(args, begin);
      const T *sources[n], *next[n];
      for (int r = 0; r < n; ++r, ahead.next()) next[r] = x + ahead.offset();
      for (; row + n <= end; row += n, out += n * width) {
        std::copy(next, next + n, sources);
        if (row + 2 * n <= end)
          for (int r = 0; r < n; ++r, ahead.next()) next[r] = x + ahead.offset();
        interleave(sources, next, args.row_size, static_cast<T*>(scratch));
        gather_words(static_cast<const T*>(scratch), args.positions, out, width, args.stream);
      }
    }
  }
  Rows rows(args, row), ahead(args, row);
  const std::int64_t distance =
      std::max<std::int64_t>(1, kAhead / (width * std::int64_t(sizeof(T))));
  for (std::int64_t k = 0; k < distance && row + k + 1 < end; ++k) ahead.next();
  for (; row < end; ++row, out += width, rows.next()) {
    gather_row(args, x + rows.offset(), x + ahead.offset(), out);
    if (row + distance + 1 < end) ahead.next();
  }
  if (args.stream) stream_fence();
}

}  // namespace

void permute(const Permute& args, std::int64_t begin, std::int64_t end, void* scratch) {
  switch (args.itemsize) {
    case 1:
      return run<std::uint8_t>(args, begin, end, scratch);
    case 2:
      return run<std::uint16_t>(args, begin, end, scratch);
    case 4:
      return run<std::uint32_t>(args, begin, end, scratch);
    case 8:
      return run<std::uint64_t>(args, begin, end, scratch);
    case 16:
      return run<Bits128>(args, begin, end, scratch);
  }
}

}  // namespace mk
