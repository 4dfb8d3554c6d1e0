#include "merge_deltas.h"

#include <algorithm>

#include "delta.h"

namespace mk {
namespace {

constexpr std::int64_t kDraws = 8;  // per Philox block

template <class A, class K>
MK_INLINE void trim_each(A* v, std::int64_t n, K threshold) {
  for (std::int64_t i = 0; i < n; ++i) {
    const K mask = magnitude_key(v[i]) >= threshold ? ~K(0) : K(0);
    v[i] = bit_cast<A>(K(bit_cast<K>(v[i]) & mask));
  }
}
MK_CLONES void trim(float* v, std::int64_t n, std::uint32_t t) { trim_each(v, n, t); }
MK_CLONES void trim(double* v, std::int64_t n, std::uint64_t t) { trim_each(v, n, t); }

MK_CLONES void draw(PhiloxKey key, std::uint64_t counter, std::int64_t blocks,
                    std::uint32_t* words) {
  for (std::int64_t q = 0; q < blocks; ++q) {
    std::uint32_t c[4];
    philox_block(key, counter + std::uint64_t(q), c);
    for (int w = 0; w < 4; ++w) words[4 * q + w] = c[w];
  }
}

template <class A, class K>
MK_INLINE void drop_each(A* v, const std::uint16_t* draws, std::int64_t n, std::uint32_t limit) {
  for (std::int64_t i = 0; i < n; ++i) {
    const K mask = std::uint32_t(draws[i]) < limit ? ~K(0) : K(0);
    v[i] = bit_cast<A>(K(bit_cast<K>(v[i]) & mask));
  }
}
MK_CLONES void drop(float* v, const std::uint16_t* d, std::int64_t n, std::uint32_t limit) {
  drop_each<float, std::uint32_t>(v, d, n, limit);
}
MK_CLONES void drop(double* v, const std::uint16_t* d, std::int64_t n, std::uint32_t limit) {
  drop_each<double, std::uint64_t>(v, d, n, limit);
}

// Zeroes what the rule does not keep among elements [at, at + n), n <= kMergeBlock.
template <class A>
void apply(const KeepRule& rule, std::int64_t at, std::int64_t n, A* v) {
  using K = key_t<A>;
  if (rule.kind == Keep::magnitude) {
    const std::int64_t ties = std::clamp<std::int64_t>(rule.cut - at, 0, n);
    trim(v, ties, K(rule.threshold));
    trim(v + ties, n - ties, K(rule.threshold + 1));
  } else if (rule.kind == Keep::random && rule.limit < 65536) {
    alignas(64) std::uint32_t words[(kMergeBlock / kDraws + 1) * 4];
    std::uint16_t draws[(kMergeBlock / kDraws + 1) * kDraws];
    const std::int64_t first = at / kDraws, last = (at + n - 1) / kDraws;
    draw(rule.key, std::uint64_t(first), last - first + 1, words);
    for (std::int64_t i = 0; i < (last - first + 1) * 4; ++i) {
      draws[2 * i] = std::uint16_t(words[i]);
      draws[2 * i + 1] = std::uint16_t(words[i] >> 16);
    }
    drop(v, draws + at % kDraws, n, rule.limit);
  }
}

template <class A>
MK_INLINE void weigh_each(A* v, A factor, A* sum, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    v[i] *= factor;
    sum[i] += v[i];
  }
}
MK_CLONES void weigh(float* v, float f, float* s, std::int64_t n) { weigh_each(v, f, s, n); }
MK_CLONES void weigh(double* v, double f, double* s, std::int64_t n) { weigh_each(v, f, s, n); }

template <class A>
MK_INLINE void vote_each(const A* v, A* votes, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const A up = v[i] > 0 ? A(1) : A(0);
    const A down = v[i] < 0 ? A(1) : A(0);
    votes[i] += up - down;
  }
}
MK_CLONES void vote(const float* v, float* votes, std::int64_t n) { vote_each(v, votes, n); }
MK_CLONES void vote(const double* v, double* votes, std::int64_t n) { vote_each(v, votes, n); }

// Integer masks rather than ?: on floats: compilers keep the loop in vector registers.
template <class A, class K>
MK_INLINE void gather_each(const A* v, const A* elected, A w, A* sum, A* weights, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const K positive = elected[i] >= 0 ? ~K(0) : K(0);
    const K not_below = v[i] <= 0 ? K(0) : ~K(0);
    const K not_above = v[i] >= 0 ? K(0) : ~K(0);
    const K agrees = (positive & not_below) | (~positive & not_above);
    sum[i] += bit_cast<A>(K(bit_cast<K>(v[i]) & agrees));
    weights[i] += bit_cast<A>(K(bit_cast<K>(w) & agrees));
  }
}
MK_CLONES void gather(const float* v, const float* e, float w, float* s, float* q, std::int64_t n) {
  gather_each<float, std::uint32_t>(v, e, w, s, q, n);
}
MK_CLONES void gather(const double* v, const double* e, double w, double* s, double* q,
                      std::int64_t n) {
  gather_each<double, std::uint64_t>(v, e, w, s, q, n);
}

template <class A>
MK_INLINE void divide_each(A* sum, const A* q, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] /= q[i] == 0 ? A(1) : q[i];
}
MK_CLONES void divide(float* s, const float* q, std::int64_t n) { divide_each(s, q, n); }
MK_CLONES void divide(double* s, const double* q, std::int64_t n) { divide_each(s, q, n); }

template <class A>
MK_INLINE void spread_nan_each(A* sum, const A* s, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] = s[i] != s[i] ? s[i] : sum[i];
}
MK_CLONES void spread_nan(float* m, const float* s, std::int64_t n) { spread_nan_each(m, s, n); }
MK_CLONES void spread_nan(double* m, const double* s, std::int64_t n) { spread_nan_each(m, s, n); }

template <class A>
MK_INLINE void scale_each(A* sum, A scale, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] *= scale;
}
MK_CLONES void scale_by(float* m, float scale, std::int64_t n) { scale_each(m, scale, n); }
MK_CLONES void scale_by(double* m, double scale, std::int64_t n) { scale_each(m, scale, n); }

template <class T>
MK_INLINE void add_each(acc_t<T>* sum, const T* base, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] = widen(base[i]) + sum[i];
}
MK_CLONES void add_base(float* m, const float* b, std::int64_t n) { add_each(m, b, n); }
MK_CLONES void add_base(double* m, const double* b, std::int64_t n) { add_each(m, b, n); }
MK_CLONES void add_base(float* m, const f16* b, std::int64_t n) { add_each(m, b, n); }
MK_CLONES void add_base(float* m, const bf16* b, std::int64_t n) { add_each(m, b, n); }

template <class T>
void run(const MergeDeltas& args, std::int64_t begin, std::int64_t end, acc_t<T>* v) {
  using A = acc_t<T>;
  alignas(64) T gathered[kMergeBlock], gathered_base[kMergeBlock];
  alignas(64) A sum[kMergeBlock], elected[kMergeBlock], q[kMergeBlock];
  for (std::int64_t at = begin; at < end; at += kMergeBlock) {
    const std::int64_t n = std::min(kMergeBlock, end - at);
    const T* base = args.base ? read_block(*args.base, at, n, gathered_base) : nullptr;
    std::fill_n(sum, n, A(0));
    for (std::int64_t i = 0; i < args.n; ++i) {
      A* vi = v + i * kMergeBlock;
      delta_block(args.xs[i], base, at, n, gathered, vi);
      apply(args.keep[i], at, n, vi);
      weigh(vi, A(args.factors[i]), sum, n);
    }
    if (args.elect == Elect::none) {
      if (args.normalize) {
        q[0] = A(args.total);
        std::fill_n(q + 1, n - 1, q[0]);
        divide(sum, q, n);
      }
    } else {
      std::copy_n(sum, n, elected);
      if (args.elect == Elect::count) {
        std::fill_n(elected, n, A(0));
        for (std::int64_t i = 0; i < args.n; ++i) vote(v + i * kMergeBlock, elected, n);
      }
      std::fill_n(sum, n, A(0));
      std::fill_n(q, n, A(0));
      for (std::int64_t i = 0; i < args.n; ++i)
        gather(v + i * kMergeBlock, elected, A(args.weights[i]), sum, q, n);
      if (args.elect == Elect::sum) spread_nan(sum, elected, n);
      if (args.normalize) divide(sum, q, n);
    }
    scale_by(sum, A(args.scale), n);
    if (base) add_base(sum, base, n);
    write_block(args.out, at, n, sum);
  }
}

// 16 interleaved sums vectorise without reordering any of them.
constexpr int kLanes = 16;
template <class A>
MK_INLINE void add_magnitudes_each(const A* v, std::int64_t n, double* lanes) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += __builtin_fabs(double(v[i + l]));
  for (int l = 0; i < n; ++i, ++l) lanes[l] += __builtin_fabs(double(v[i]));
}
MK_CLONES void add_magnitudes(const float* v, std::int64_t n, double* lanes) {
  add_magnitudes_each(v, n, lanes);
}
MK_CLONES void add_magnitudes(const double* v, std::int64_t n, double* lanes) {
  add_magnitudes_each(v, n, lanes);
}

}  // namespace

void merge_deltas(const MergeDeltas& args, std::int64_t begin, std::int64_t end, void* scratch) {
  with_type(args.xs[0].dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    run<T>(args, begin, end, static_cast<acc_t<T>*>(scratch));
  });
}

void l1_norms(const View& x, const View* base, const KeepRule& keep, std::int64_t begin,
              std::int64_t end, double* sums) {
  with_type(x.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    alignas(64) T gathered[kMergeBlock], gathered_base[kMergeBlock];
    alignas(64) acc_t<T> v[kMergeBlock];
    double all[kLanes] = {}, kept[kLanes] = {};
    for (std::int64_t at = begin; at < end; at += kMergeBlock) {
      const std::int64_t n = std::min(kMergeBlock, end - at);
      const T* b = base ? read_block(*base, at, n, gathered_base) : nullptr;
      delta_block(x, b, at, n, gathered, v);
      add_magnitudes(v, n, all);
      apply(keep, at, n, v);
      add_magnitudes(v, n, kept);
    }
    for (int l = 0; l < kLanes; ++l) {
      sums[0] += all[l];
      sums[1] += kept[l];
    }
  });
}

}  // namespace mk
