#include "merge_deltas.h"

#include <algorithm>

namespace mk {
namespace {

constexpr std::int64_t kDraws = 8;  // per Philox block
constexpr std::int64_t kFew = 4;    // models up to which all of them fit in registers

// Blocks of x - base, each difference rounded once; x itself without base.
template <class T>
MK_CLONES void subtract(const T* x, const T* base, acc_t<T>* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = widen(x[i]) - widen(base[i]);
}

template <class T>
MK_CLONES void copy_widened(const T* x, acc_t<T>* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = widen(x[i]);
}

// base == nullptr stands for zero.
template <class T>
void delta_block(const View& x, const T* base, std::int64_t begin, std::int64_t n, T* gathered,
                 acc_t<T>* out) {
  const T* values = read_block(x, begin, n, gathered);
  if (base)
    subtract(values, base, out, n);
  else
    copy_widened(values, out, n);
}

// Masks are integers rather than ?: on floats: compilers keep such loops in vector registers.
template <class A>
MK_INLINE A masked(A value, key_t<A> mask) {
  return bit_cast<A>(key_t<A>(bit_cast<key_t<A>>(value) & mask));
}
template <class A>
MK_INLINE key_t<A> mask_if(bool condition) {
  return condition ? ~key_t<A>(0) : key_t<A>(0);
}
// Whether v takes part under the elected sign; a NaN always does.
template <class A>
MK_INLINE key_t<A> agreement(A v, A elected) {
  const key_t<A> positive = mask_if<A>(elected >= 0);
  return (positive & ~mask_if<A>(v <= 0)) | (~positive & ~mask_if<A>(v >= 0));
}

template <class A>
MK_CLONES void trim(A* v, std::int64_t n, key_t<A> threshold) {
  for (std::int64_t i = 0; i < n; ++i)
    v[i] = masked(v[i], mask_if<A>(magnitude_key(v[i]) >= threshold));
}

MK_CLONES void draw(PhiloxKey key, std::uint64_t counter, std::int64_t blocks,
                    std::uint32_t* words) {
  for (std::int64_t q = 0; q < blocks; ++q) {
    std::uint32_t c[4];
    philox_block(key, counter + std::uint64_t(q), c);
    for (int w = 0; w < 4; ++w) words[4 * q + w] = c[w];
  }
}

template <class A>
MK_CLONES void drop(A* v, const std::uint16_t* draws, std::int64_t n, std::uint32_t limit) {
  for (std::int64_t i = 0; i < n; ++i)
    v[i] = masked(v[i], mask_if<A>(std::uint32_t(draws[i]) < limit));
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
MK_CLONES void weigh(A* v, A factor, A* sum, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    v[i] *= factor;
    sum[i] += v[i];
  }
}

template <class A>
MK_CLONES void vote(const A* v, A* votes, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const A up = v[i] > 0 ? A(1) : A(0);
    const A down = v[i] < 0 ? A(1) : A(0);
    votes[i] += up - down;
  }
}

template <class A>
MK_CLONES void gather(const A* v, const A* elected, A weight, A* sum, A* q, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const key_t<A> agrees = agreement(v[i], elected[i]);
    sum[i] += masked(v[i], agrees);
    q[i] += masked(weight, agrees);
  }
}

template <class A>
MK_CLONES void divide(A* sum, const A* q, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] /= q[i] == 0 ? A(1) : q[i];
}

template <class A>
MK_CLONES void spread_nan(A* sum, const A* s, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] = s[i] != s[i] ? s[i] : sum[i];
}

template <class A>
MK_CLONES void scale_by(A* sum, A scale, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] *= scale;
}

template <class T>
MK_CLONES void add_base(acc_t<T>* sum, const T* base, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] = widen(base[i]) + sum[i];
}

// The two commonest recipes for few models, in registers from load to sum: TIES (kElect: by sum,
// normalized) and plain weighted task vectors. Same steps in the same order as the general path.
template <class T>
struct Few {
  const T* x[kFew];
  key_t<T> threshold[kFew];
  acc_t<T> factor[kFew], weight[kFew];
  acc_t<T> scale;
};
template <int kModels, bool kElect, class T>
MK_CLONES void merge_few(const Few<T>& few, const T* base, acc_t<T>* out, std::int64_t n) {
  using A = acc_t<T>;
  const Few<T> f = few;
  for (std::int64_t i = 0; i < n; ++i) {
    const A b = widen(base[i]);
    A v[kModels], m = 0;
#pragma GCC unroll 4
    for (int j = 0; j < kModels; ++j) {
      const A d = widen(f.x[j][i]) - b;
      v[j] = masked(d, mask_if<A>(magnitude_key(d) >= f.threshold[j])) * f.factor[j];
      m += v[j];
    }
    if (kElect) {
      const A s = m;
      A q = 0;
      m = 0;
#pragma GCC unroll 4
      for (int j = 0; j < kModels; ++j) {
        const key_t<A> agrees = agreement(v[j], s);
        m += masked(v[j], agrees);
        q += masked(f.weight[j], agrees);
      }
      m = s != s ? s : m;
      m /= q == 0 ? A(1) : q;
    }
    out[i] = b + m * f.scale;
  }
}
template <bool kElect, class T>
void merge_few(std::int64_t models, const Few<T>& few, const T* base, acc_t<T>* out,
               std::int64_t n) {
  switch (models) {
    case 1:
      return merge_few<1, kElect>(few, base, out, n);
    case 2:
      return merge_few<2, kElect>(few, base, out, n);
    case 3:
      return merge_few<3, kElect>(few, base, out, n);
    case 4:
      return merge_few<4, kElect>(few, base, out, n);
  }
}

bool suits_few(const MergeDeltas& args) {
  const bool ties = args.elect == Elect::sum && args.normalize;
  const bool plain = args.elect == Elect::none && !args.normalize;
  return args.base && args.n <= kFew && (ties || plain) &&
         std::none_of(args.keep, args.keep + args.n,
                      [](const KeepRule& rule) { return rule.kind == Keep::random; });
}

template <class T>
void run_few(const MergeDeltas& args, std::int64_t begin, std::int64_t end) {
  alignas(64) T gathered[kFew + 1][kMergeBlock];
  alignas(64) acc_t<T> sum[kMergeBlock];
  for (std::int64_t at = begin, n; at < end; at += n) {
    n = std::min(kMergeBlock, end - at);
    for (std::int64_t i = 0; i < args.n; ++i)  // a block lies on one side of every cut
      if (args.keep[i].cut > at) n = std::min(n, args.keep[i].cut - at);
    Few<T> few;
    for (std::int64_t i = 0; i < args.n; ++i) {
      const KeepRule& rule = args.keep[i];
      few.x[i] = read_block(args.xs[i], at, n, gathered[i]);
      few.threshold[i] = key_t<T>(rule.kind == Keep::all ? 0 : rule.threshold + (at >= rule.cut));
      few.factor[i] = acc_t<T>(args.factors[i]);
      few.weight[i] = acc_t<T>(args.weights[i]);
    }
    few.scale = acc_t<T>(args.scale);
    const T* base = read_block(*args.base, at, n, gathered[kFew]);
    if (args.elect == Elect::sum)
      merge_few<true>(args.n, few, base, sum, n);
    else
      merge_few<false>(args.n, few, base, sum, n);
    write_block(args.out, at, n, sum);
  }
}

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
MK_CLONES void add_magnitudes(const A* v, std::int64_t n, double* lanes) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += __builtin_fabs(double(v[i + l]));
  for (int l = 0; i < n; ++i, ++l) lanes[l] += __builtin_fabs(double(v[i]));
}

}  // namespace

void merge_deltas(const MergeDeltas& args, std::int64_t begin, std::int64_t end, void* scratch) {
  with_type(args.xs[0].dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if (suits_few(args))
      run_few<T>(args, begin, end);
    else
      run<T>(args, begin, end, static_cast<acc_t<T>*>(scratch));
  });
  if (args.out.stream) stream_fence();
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
