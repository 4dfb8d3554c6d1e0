#include "permute.h"

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

template <class T>
void interleave(const T* const* rows, std::int64_t size, T* words) {
  using W = typename Words<T>::Word;
  constexpr int n = Words<T>::kLanes;
  std::int64_t j = 0;
  for (; j + n <= size; j += n) {
    W block[n];
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

constexpr std::size_t kStreamedRow = 1 << 15;  // bytes from which on streaming a row pays

template <class T>
void gather_row(const Permute& args, const T* x, T* out) {
  const Axis& last = args.axes[args.ndim - 1];
  const std::size_t bytes = std::size_t(last.size) * sizeof(T);
  if (args.positions)
    for (std::int64_t j = 0; j < last.size; ++j) out[j] = x[args.positions[j]];
  else if (last.offsets)
    for (std::int64_t j = 0; j < last.size; ++j) out[j] = x[last.offsets[j]];
  else if (last.stride == 1 && args.stream && bytes >= kStreamedRow)
    stream_copy(out, x, bytes);
  else if (last.stride == 1)
    std::memcpy(out, x, bytes);
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
  Rows rows(args, begin);
  std::int64_t row = begin;
  if constexpr (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8) {
    constexpr int n = Words<T>::kLanes;
    const bool worthwhile = args.positions && 2 * width >= args.row_size;
    for (; worthwhile && row + n <= end; row += n, out += n * width) {
      const T* sources[n];
      for (int r = 0; r < n; ++r, rows.next()) sources[r] = x + rows.offset();
      interleave(sources, args.row_size, static_cast<T*>(scratch));
      gather_words(static_cast<const T*>(scratch), args.positions, out, width, args.stream);
    }
  }
  for (; row < end; ++row, out += width, rows.next()) gather_row(args, x + rows.offset(), out);
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
