#include "permute.h"

#include <algorithm>

#include "columns.h"

namespace mk {
namespace {

struct Bits128 {
  std::uint64_t low, high;
};

// ---- one row ---------------------------------------------------------------------------------

// Bytes from which on streaming a row pays, even if it shares cache lines with its neighbours.
constexpr std::size_t kStreamedRow = 1 << 15;

// What is asked for ahead, and how much at once. Rows lie anywhere, so no hardware sees the next
// one coming; 1 KiB at once took 1.3 times as long as a line at a time.
constexpr std::int64_t kAhead = 1 << 13;
constexpr std::size_t kStep = 1 << 8;

void copy_row(void* to, const void* from, const void* next, std::size_t bytes, bool stream) {
  char* out = static_cast<char*>(to);
  const char *x = static_cast<const char*>(from), *ahead = static_cast<const char*>(next);
  const bool whole_lines = (reinterpret_cast<std::uintptr_t>(out) | bytes) % kLine == 0;
  if (stream && whole_lines) {
    for (std::size_t at = 0; at < bytes; at += kLine) {
      __builtin_prefetch(ahead + at);
      stream_line(out + at, x + at);
    }
    return;
  }
  for (std::size_t at = 0, n; at < bytes; at += n) {
    n = std::min(kStep, bytes - at);
    for (std::size_t i = 0; i < n; i += kLine) __builtin_prefetch(ahead + at + i);
    if (stream && bytes >= kStreamedRow)
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
    constexpr int n = kTogether<T>;
    const bool worthwhile = args.positions && 2 * width >= args.row_size;
    if (worthwhile && row + n <= end) {
      Rows rows(args, begin);
      const T *sources[n], *next[n];
      for (int r = 0; r < n; ++r, rows.next()) next[r] = x + rows.offset();
      for (; row + n <= end; row += n, out += n * width) {
        std::copy(next, next + n, sources);
        if (row + 2 * n <= end)
          for (int r = 0; r < n; ++r, rows.next()) next[r] = x + rows.offset();
        Ahead ahead(next, n, args.row_size, n / 2);  // in equal parts
        T* words = static_cast<T*>(scratch);
        interleave(sources, args.row_size, words, ahead);
        gather_words(words, args.positions, out, width, args.stream, ahead);
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
