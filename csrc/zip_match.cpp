#include "zip_match.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace mk {
namespace {

using Slot = std::int32_t;

constexpr std::int64_t kRegister = 64;  // bytes of a row that are compared at once
constexpr std::int64_t kTile = 32;  // rows and columns that are compared with their mirror image

template <class T>
constexpr std::int64_t kLanes = kRegister / std::int64_t(sizeof(T));
template <class T>
struct Register;
template <>
struct Register<float> {
  using Lanes = float __attribute__((vector_size(kRegister)));
};
template <>
struct Register<double> {
  using Lanes = double __attribute__((vector_size(kRegister)));
};
template <class T>
constexpr T kNever = -std::numeric_limits<T>::infinity();

// Elements of a row in scratch. One line more than the slots need: rows a power of two apart would
// share the few places of a cache that their columns may take.
template <class T>
std::int64_t row_length(std::int64_t size) {
  return (size + kLanes<T> - 1) / kLanes<T> * kLanes<T> + kLanes<T>;
}

// The largest min(row, limit) and the first place of it; n is a multiple of kLanes.
template <class T>
MK_CLONES std::int64_t first_maximum(const T* row, const T* limit, std::int64_t n, T* value) {
  using Lanes = typename Register<T>::Lanes;
  using Places = decltype(Lanes{} < Lanes{});
  Lanes most = Lanes{} + kNever<T>;
  Places first{}, place{};  // of each lane's maximum; of what is read, but for the lane
  for (std::int64_t i = 0; i < n; i += kLanes<T>, place += kLanes<T>) {
    Lanes v, l;
    std::memcpy(&v, row + i, kRegister);
    std::memcpy(&l, limit + i, kRegister);
    v = v < l ? v : l;
    const Places more = v > most;
    most = more ? v : most;
    first = more ? place : first;
  }
  std::int64_t best = 0;
  for (int l = 1; l < kLanes<T>; ++l)
    if (most[l] > most[best] || (most[l] == most[best] && first[l] + l < first[best] + best))
      best = l;
  *value = most[best];
  return first[best] + best;
}

template <class T>
MK_CLONES void merge_rows(T* row, const T* other, T factor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) row[i] = factor * std::min(row[i], other[i]);
}

// Elements of x are `down` and `right` apart; rows of the tile `length`.
template <class Stored, class T>
MK_CLONES void widen_tile(const Stored* x, std::int64_t down, std::int64_t right, T* tile,
                          std::int64_t length, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; ++i, x += down, tile += length)
    if (right == 1)
      for (std::int64_t j = 0; j < columns; ++j) tile[j] = widen(x[j]);
    else
      for (std::int64_t j = 0; j < columns; ++j) tile[j] = widen(x[j * right]);
}

// Whether the rows of one tile are the columns of the other; rows are `length` apart.
template <class T>
MK_CLONES bool mirrored(const T* tile, const T* other, std::int64_t length, std::int64_t rows,
                        std::int64_t columns) {
  int differ = 0;
  for (std::int64_t j = 0; j < columns; ++j)
    for (std::int64_t i = 0; i < rows; ++i) differ |= tile[i * length + j] != other[j * length + i];
  return !differ;
}

// The state of one matching. Of every row the largest similarity is remembered and where it first
// stands. When that place goes or falls, the value stays as an upper bound, and the row is read
// again only once it has the largest bound of all.
template <class T>
class Matching {
 public:
  Matching(const ZipMatch& args, void* scratch)
      : args_(args), size_(args.offsets[args.models]), length_(row_length<T>(size_)) {
    matrix_ = static_cast<T*>(scratch);
    bound_ = matrix_ + size_ * length_;
    limit_ = bound_ + length_;
    column_ = limit_ + length_;
    best_ = reinterpret_cast<Slot*>(column_ + length_);
    left_ = best_ + size_;
    model_ = left_ + size_;
    into_ = model_ + size_;
    gone_ = into_ + size_;
    for (std::int64_t m = 0; m < args.models; ++m)
      std::fill(model_ + args.offsets[m], model_ + args.offsets[m + 1], Slot(m));
  }

  void run(std::int64_t* labels) {
    std::fill(labels, labels + size_, 0);
    begin();
    while (count_ > args_.width) {
      const std::int64_t row = best_row();
      if (bound_[row] > kNever<T>) {
        merge(row, best_[row]);
      } else if (args_.zipit) {
        labels[left_[0]] = -1;
        remove(0);
      } else {
        forbidding_ = false;
        begin();
      }
    }
    number(labels);
  }

 private:
  T* row(std::int64_t slot) { return matrix_ + slot * length_; }

  // All merges so far, on similarities as they were given.
  void begin() {
    load();
    count_ = size_;
    for (std::int64_t k = 0; k < size_; ++k) left_[k] = Slot(k);
    std::fill(bound_, bound_ + length_, kNever<T>);
    std::fill(limit_, limit_ + length_, kNever<T>);
    std::fill(limit_, limit_ + size_, -kNever<T>);
    const std::int64_t merges = std::exchange(merges_, 0);
    for (std::int64_t i = 0; i < size_; ++i) rescan(i);
    for (std::int64_t i = 0; i < merges; ++i) merge(into_[i], gone_[i]);
    for (std::int64_t m = 0; m < args_.models; ++m)
      if (forbidding_ && args_.budgets[m] <= 0) forbid_within(m);
  }

  void load() {
    with_type(args_.correlation.dtype, [&](auto* tag) {
      using Stored = std::remove_pointer_t<decltype(tag)>;
      if constexpr (std::is_same_v<acc_t<Stored>, T>)
        load_from(static_cast<const Stored*>(args_.correlation.data));
    });
  }

  template <class Stored>
  void load_from(const Stored* x) {
    const std::int64_t down = args_.correlation.strides[0], right = args_.correlation.strides[1];
    const auto load_tile = [&](std::int64_t i, std::int64_t j, std::int64_t m, std::int64_t n) {
      widen_tile(x + i * down + j * right, down, right, row(i) + j, length_, m, n);
    };
    symmetric_ = !(args_.zipit && args_.alpha == 0);
    for (std::int64_t i = 0; i < size_; i += kTile)
      for (std::int64_t j = 0; j <= i; j += kTile) {
        const std::int64_t rows = std::min(kTile, size_ - i), columns = std::min(kTile, size_ - j);
        load_tile(i, j, rows, columns);
        if (j < i) load_tile(j, i, columns, rows);
        symmetric_ = symmetric_ && mirrored(row(i) + j, row(j) + i, length_, rows, columns);
      }
    for (std::int64_t i = 0; i < size_; ++i) {
      row(i)[i] = kNever<T>;
      std::fill(row(i) + size_, row(i) + length_, kNever<T>);
    }
  }

  // The first row of the largest similarity, whose bound is that similarity.
  std::int64_t best_row() {
    for (;;) {
      T value;
      const std::int64_t i = first_maximum(bound_, limit_, length_, &value);
      if (best_[i] >= 0) return i;
      rescan(i);
    }
  }

  void rescan(std::int64_t i) {
    best_[i] = Slot(first_maximum(row(i), limit_, length_, bound_ + i));
  }

  void merge(std::int64_t r, std::int64_t c) {
    if (c < r) std::swap(r, c);
    into_[merges_] = Slot(r), gone_[merges_++] = Slot(c);
    const T factor = args_.alpha == 0 ? T(1) : T(args_.alpha);
    merge_rows(row(r), row(c), factor, length_);
    T* column = symmetric_ ? row(r) : column_;
    if (!symmetric_)
      for (std::int64_t i = 0; i < count_; ++i) {
        const T* other = row(left_[i]);
        column[left_[i]] = factor * std::min(other[r], other[c]);
      }
    const std::int64_t position = std::lower_bound(left_, left_ + count_, Slot(c)) - left_;
    if (args_.alpha == 0 && forbidding_) {
      forbid_models(r, model_[r], position, column);
      forbid_models(r, model_[c], position, column);
    }
    remove(position);
    for (std::int64_t i = 0; i < count_; ++i)
      if (left_[i] != r) update(left_[i], Slot(r), Slot(c), column[left_[i]]);
    rescan(r);
    if (forbidding_ && model_[r] == model_[c] && --args_.budgets[model_[r]] == 0)
      forbid_within(model_[r]);
  }

  void remove(std::int64_t position) {
    bound_[left_[position]] = limit_[left_[position]] = kNever<T>;
    std::copy(left_ + position + 1, left_ + count_, left_ + position);
    --count_;
  }

  // Similarity k, r has a new value, and k, c is gone.
  void update(std::int64_t k, Slot r, Slot c, T value) {
    row(k)[r] = value;
    if (value > bound_[k]) {
      bound_[k] = value;
      best_[k] = r;
    } else if (value == bound_[k]) {
      if (r < best_[k]) best_[k] = r;
    } else if (best_[k] == r || best_[k] == c) {
      best_[k] = -1;
    }
  }

  // Slot r takes no partner of model m; slot c, at `position` of those left, is about to go.
  void forbid_models(std::int64_t r, std::int64_t m, std::int64_t position, T* column) {
    for (std::int64_t p = args_.offsets[m]; p < args_.offsets[m + 1]; ++p)
      if (!args_.zipit) {
        column[p] = row(r)[p] = kNever<T>;
      } else {
        if (p < count_) column[left_[p]] = kNever<T>;
        if (p < count_ - 1) row(r)[left_[p < position ? p : p + 1]] = kNever<T>;
      }
  }

  void forbid_within(std::int64_t m) {
    const std::int64_t first = args_.offsets[m], end = args_.offsets[m + 1];
    for (std::int64_t i = first; i < end; ++i) {
      std::fill(row(i) + first, row(i) + end, kNever<T>);
      if (best_[i] >= first && best_[i] < end) best_[i] = -1;
    }
  }

  // Labels of -1 are those of lost groups' lowest slots.
  void number(std::int64_t* labels) {
    Slot* lowest = left_;  // of each slot's group
    for (std::int64_t k = 0; k < size_; ++k) lowest[k] = Slot(k);
    for (std::int64_t i = 0; i < merges_; ++i) lowest[gone_[i]] = into_[i];
    for (std::int64_t k = 0, groups = 0; k < size_; ++k)
      if (lowest[k] != k)
        labels[k] = labels[lowest[k]];  // which is lower, and so has its label already
      else if (labels[k] != -1)
        labels[k] = groups++;
  }

  const ZipMatch& args_;
  std::int64_t size_, length_, count_ = 0, merges_ = 0;
  bool symmetric_ = true, forbidding_ = true;
  T *matrix_, *bound_, *limit_, *column_;
  Slot* best_;  // where the bound stands; -1: somewhere, or nowhere any more
  Slot* left_;  // the slots that are left, in order
  Slot *model_, *into_, *gone_;
};

}  // namespace

std::int64_t zip_match_scratch(const View& correlation) {
  const std::int64_t size = correlation.shape[0];
  const bool wide = correlation.dtype == DType::f64;
  const std::int64_t row = wide ? row_length<double>(size) * std::int64_t(sizeof(double))
                                : row_length<float>(size) * std::int64_t(sizeof(float));
  return (size + 3) * row + 5 * size * std::int64_t(sizeof(Slot));
}

void zip_match(const ZipMatch& args, void* scratch, std::int64_t* labels) {
  if (args.correlation.dtype == DType::f64)
    Matching<double>(args, scratch).run(labels);
  else
    Matching<float>(args, scratch).run(labels);
}

}  // namespace mk
