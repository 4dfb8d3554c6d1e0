#include "permute.h"

namespace mk {
namespace {

struct Bits128 {
  std::uint64_t low, high;
};

template <class T, class I>
MK_INLINE void gather_each(const T* x, const I* offsets, T* out, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) out[j] = x[offsets[j]];
}

// Several rows under one index: each offset is loaded once for all of them.
constexpr int kRows = 4;
template <class T>
MK_INLINE void gather_rows(const T* const* x, const std::int32_t* offsets, T* out,
                           std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) {
    const std::int64_t at = offsets[j];
    for (int r = 0; r < kRows; ++r) out[r * n + j] = x[r][at];
  }
}

template <class T>
void gather_row(const Permute& args, const T* x, T* out) {
  const Axis& last = args.axes[args.ndim - 1];
  if (args.inner)
    gather_each(x, args.inner, out, last.size);
  else if (last.offsets)
    gather_each(x, last.offsets, out, last.size);
  else if (last.stride == 1)
    std::memcpy(out, x, std::size_t(last.size) * sizeof(T));
  else
    for (std::int64_t j = 0; j < last.size; ++j) out[j] = x[j * last.stride];
}

template <class T>
void run(const Permute& args, std::int64_t begin, std::int64_t end) {
  const int outer = args.ndim - 1;
  const std::int64_t width = args.axes[outer].size;
  const T* x = static_cast<const T*>(args.x);
  T* out = static_cast<T*>(args.out) + begin * width;

  std::int64_t index[kMaxDims] = {};
  std::int64_t rest = begin;
  for (int d = outer - 1; d >= 0; --d) {
    index[d] = rest % args.axes[d].size;
    rest /= args.axes[d].size;
  }
  auto offset = [&](int d) {
    const Axis& axis = args.axes[d];
    return axis.offsets ? axis.offsets[index[d]] : index[d] * axis.stride;
  };
  std::int64_t partial[kMaxDims + 1] = {};  // partial[d]: offset of axes before d
  for (int d = 0; d < outer; ++d) partial[d + 1] = partial[d] + offset(d);

  auto advance = [&] {
    int d = outer - 1;
    for (; d >= 0; --d) {
      if (++index[d] < args.axes[d].size) break;
      index[d] = 0;
    }
    for (d = d < 0 ? 0 : d; d < outer; ++d) partial[d + 1] = partial[d] + offset(d);
  };

  std::int64_t row = begin;
  if (args.inner) {
    for (; row + kRows <= end; row += kRows, out += kRows * width) {
      const T* rows[kRows];
      for (int r = 0; r < kRows; ++r, advance()) rows[r] = x + partial[outer];
      gather_rows(rows, args.inner, out, width);
    }
  }
  for (; row < end; ++row, out += width, advance()) gather_row(args, x + partial[outer], out);
}

}  // namespace

void permute(const Permute& args, std::int64_t begin, std::int64_t end) {
  switch (args.itemsize) {
    case 1:
      return run<std::uint8_t>(args, begin, end);
    case 2:
      return run<std::uint16_t>(args, begin, end);
    case 4:
      return run<std::uint32_t>(args, begin, end);
    case 8:
      return run<std::uint64_t>(args, begin, end);
    case 16:
      return run<Bits128>(args, begin, end);
  }
}

}  // namespace mk
