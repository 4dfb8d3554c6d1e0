// Several rows under one index of their columns.
//
// A random load for each element cannot keep up with memory. So kTogether rows are interleaved into
// words of 16 bytes, one word for each column: a load then fetches a column of all of them, and a
// square block of such words, transposed, is a piece of every row of the result. More rows would
// take fewer instructions, but leave the first-level cache.
#pragma once

#include "common.h"

namespace mk {

// T is an unsigned integer of 2, 4 or 8 bytes.
template <class T>
constexpr int kTogether = int(16 / sizeof(T));

// The rows that come next. They lie anywhere, so no hardware sees them coming: they are asked for
// one after the other, `lines` cache lines at a time between other work. Many at once took 1.3
// times as long.
class Ahead {
 public:
  Ahead() = default;
  template <class T>
  Ahead(const T* const* rows, int count, std::int64_t size, int lines)
      : rows_(reinterpret_cast<const char* const*>(rows)),
        left_(count),
        bytes_(size * std::int64_t(sizeof(T))),
        lines_(lines) {}
  void ask() {
    if (!left_) return;
    for (int i = 0; i < lines_; ++i) __builtin_prefetch(*rows_ + at_ + i * std::int64_t(kLine));
    at_ += lines_ * std::int64_t(kLine);
    if (at_ >= bytes_) at_ = 0, ++rows_, --left_;
  }

 private:
  const char* const* rows_ = nullptr;
  int left_ = 0;
  std::int64_t bytes_ = 0, at_ = 0;
  int lines_ = 0;
};

// words[c * kTogether + r] = rows[r][c] for c < size and r < kTogether. Here and below `ahead` is
// asked once for every cache line of a row.
template <class T>
void interleave(const T* const* rows, std::int64_t size, T* words, Ahead& ahead);

// out[r * width + j] = words[positions[j] * kTogether + r] for r < kTogether and j < width.
// `stream`: past the caches, where rows are whole cache lines.
template <class T>
void gather_words(const T* words, const std::int32_t* positions, T* out, std::int64_t width,
                  bool stream, Ahead& ahead);

}  // namespace mk
