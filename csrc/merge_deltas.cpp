#include "merge_deltas.h"

#include <algorithm>

namespace mk {
namespace {

// Whether u takes part under the elected signs; a NaN does under either.
template <class A>
MK_INLINE key_t<A> agreement(A u, key_t<A> positive, key_t<A> negative) {
  return (positive & ~mask_if<A>(u <= 0)) | (negative & ~mask_if<A>(u >= 0));
}
// The same where just one sign is elected, negative if `flip` is the sign bit and not 0.
template <class A>
MK_INLINE key_t<A> agreement(A u, key_t<A> flip) {
  return ~mask_if<A>(bit_cast<A>(key_t<A>(bit_cast<key_t<A>>(u) ^ flip)) <= 0);
}

// ---- few models: the commonest recipes in registers from load to sum ----------------------------

constexpr std::int64_t kFew = 4;  // models up to which all of them fit

enum class Recipe { plain, elect, elect_mean, elect_weighed_mean, present_mean };

template <class T>
struct Few {
  const T* x[kFew];
  const std::uint16_t* draws[kFew];
  std::uint32_t limit[kFew];
  key_t<T> low[kFew], width[kFew];
  acc_t<T> before[kFew], after[kFew], weight[kFew];
  acc_t<T> scale, least, instead;
};

// kDrawn: elements are kept by draws, else by an interval of magnitudes.
template <int kModels, Recipe kRecipe, bool kDrawn, class T>
MK_CLONES void merge_few(const Few<T>& few, const T* base, acc_t<T>* out, std::int64_t n) {
  using A = acc_t<T>;
  const Few<T> f = few;
  for (std::int64_t i = 0; i < n; ++i) {
    const A b = widen(base[i]);
    A u[kModels], m = 0;
#pragma GCC unroll 4
    for (int j = 0; j < kModels; ++j) {
      const A d = widen(f.x[j][i]) - b;
      const key_t<A> kept = kDrawn
                                ? mask_if<A>(std::uint32_t(f.draws[j][i]) < f.limit[j])
                                : mask_if<A>(key_t<A>(magnitude_bits(d) - f.low[j]) < f.width[j]);
      u[j] = masked(d, kept) * f.before[j];
      m += u[j];
    }
    if (kRecipe != Recipe::plain) {
      const A s = m;
      const key_t<A> flip = ~mask_if<A>(s >= 0) & (key_t<A>(1) << (8 * sizeof(A) - 1));
      A q = 0;
      m = 0;
#pragma GCC unroll 4
      for (int j = 0; j < kModels; ++j) {
        const key_t<A> agrees =
            kRecipe == Recipe::present_mean ? mask_if<A>(u[j] != 0) : agreement(u[j], flip);
        const A v = kRecipe == Recipe::elect_weighed_mean ? u[j] * f.after[j] : u[j];
        m += masked(v, agrees);
        q += masked(f.weight[j], agrees);
      }
      if (kRecipe != Recipe::present_mean) m = s != s ? s : m;
      if (kRecipe != Recipe::elect) m /= (q < 0 ? -q : q) <= f.least ? f.instead : q;
    }
    out[i] = b + m * f.scale;
  }
}
template <Recipe kRecipe, bool kDrawn, class T>
void merge_few(std::int64_t models, const Few<T>& few, const T* base, acc_t<T>* out,
               std::int64_t n) {
  switch (models) {
    case 1:
      return merge_few<1, kRecipe, kDrawn>(few, base, out, n);
    case 2:
      return merge_few<2, kRecipe, kDrawn>(few, base, out, n);
    case 3:
      return merge_few<3, kRecipe, kDrawn>(few, base, out, n);
    case 4:
      return merge_few<4, kRecipe, kDrawn>(few, base, out, n);
  }
}
template <bool kDrawn, class T>
void merge_few(Recipe recipe, std::int64_t models, const Few<T>& few, const T* base, acc_t<T>* out,
               std::int64_t n) {
  switch (recipe) {
    case Recipe::plain:
      return merge_few<Recipe::plain, kDrawn>(models, few, base, out, n);
    case Recipe::elect:
      return merge_few<Recipe::elect, kDrawn>(models, few, base, out, n);
    case Recipe::elect_mean:
      return merge_few<Recipe::elect_mean, kDrawn>(models, few, base, out, n);
    case Recipe::elect_weighed_mean:
      return merge_few<Recipe::elect_weighed_mean, kDrawn>(models, few, base, out, n);
    case Recipe::present_mean:
      return merge_few<Recipe::present_mean, kDrawn>(models, few, base, out, n);
  }
}

bool suits_few(const MergeDeltas& args) {
  const bool plain = args.elect == Elect::everyone && !args.normalize;
  const bool mean = args.elect == Elect::present && args.normalize;
  const bool elected = args.elect == Elect::sum && args.zero == Zero::positive;
  const KeepRule* end = args.keep + args.n;
  const auto drawn = std::count_if(args.keep, end, is_drawn);
  const bool weighed =
      std::any_of(args.after, args.after + args.n, [](double a) { return a != 1; });
  return args.base && args.n <= kFew && !args.max && !args.alone && !args.stepwise &&
         (plain || (mean && !weighed) || (elected && (args.normalize || !weighed))) &&
         (drawn == 0 || drawn == args.n);
}

template <class T>
void run_few(const MergeDeltas& args, std::int64_t begin, std::int64_t end) {
  using A = acc_t<T>;
  alignas(64) T gathered[kFew + 1][kMergeBlock];
  alignas(64) std::uint16_t draws[kFew][kMergeBlock];
  alignas(64) A sum[kMergeBlock];
  const bool weighed =
      std::any_of(args.after, args.after + args.n, [](double a) { return a != 1; });
  const Recipe recipe = args.elect == Elect::everyone  ? Recipe::plain
                        : args.elect == Elect::present ? Recipe::present_mean
                        : weighed                      ? Recipe::elect_weighed_mean
                        : args.normalize               ? Recipe::elect_mean
                                                       : Recipe::elect;
  const bool drawn = is_drawn(args.keep[0]);
  Few<T> few;
  few.scale = A(args.scale), few.least = A(args.least), few.instead = A(args.instead);
  const auto shares = [&](std::int64_t i) {  // one mask for several models
    return i > 0 && args.keep[i].kind == Keep::bits && args.keep[i].bits == args.keep[i - 1].bits;
  };
  for (std::int64_t i = 0; i < args.n; ++i) {
    few.draws[i] = shares(i) ? few.draws[i - 1] : draws[i];
    few.limit[i] = draw_limit(args.keep[i]);
    few.before[i] = A(args.before[i]);
    few.after[i] = A(args.after[i]);
    few.weight[i] = A(args.weights[i]);
  }
  for (std::int64_t at = begin, n; at < end; at += n) {
    n = std::min(kMergeBlock, end - at);
    for (std::int64_t i = 0; i < args.n; ++i) n = up_to_cut(args.keep[i], at, n);
    for (std::int64_t i = 0; i < args.n; ++i) {
      few.x[i] = read_block(args.xs[i], at, n, gathered[i]);
      if (drawn) {
        if (!shares(i)) draw_block(args.keep[i], at, n, draws[i]);
      } else {
        const Interval kept = interval_at<A>(args.keep[i], at);
        few.low[i] = key_t<T>(kept.low), few.width[i] = key_t<T>(kept.width);
      }
    }
    const T* base = read_block(*args.base, at, n, gathered[kFew]);
    if (drawn)
      merge_few<true>(recipe, args.n, few, base, sum, n);
    else
      merge_few<false>(recipe, args.n, few, base, sum, n);
    write_block(args.out, at, n, sum);
  }
}

// ---- any number of models and any recipe, step by step over blocks in the first cache -----------

template <class A>
MK_CLONES void multiply(A* v, A factor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) v[i] *= factor;
}

template <class A>
MK_CLONES void divide_by(A* v, A divisor, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) v[i] /= divisor;
}

// d * 0 where u is +0: where d was dropped, and where it is 0 itself.
template <class A>
MK_CLONES void multiply_dropped(A* u, const A* d, std::int64_t n) {
  using K = key_t<A>;
  for (std::int64_t i = 0; i < n; ++i) {
    const K dropped = mask_if<A>(bit_cast<K>(u[i]) == 0);
    u[i] = bit_cast<A>(K(bit_cast<K>(u[i]) | (bit_cast<K>(A(d[i] * 0)) & dropped)));
  }
}

template <class A>
MK_CLONES void add(A* sum, const A* v, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] += v[i];
}

template <class A>
MK_CLONES void vote(const A* u, A* votes, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const A up = u[i] > 0 ? A(1) : A(0);
    const A down = u[i] < 0 ? A(1) : A(0);
    votes[i] += up - down;
  }
}

template <class A>
MK_CLONES void select_present(const A* u, key_t<A>* agrees, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) agrees[i] = mask_if<A>(u[i] != 0);
}

template <class A>
MK_CLONES void select_elected(const A* u, const A* votes, bool zero_positive, bool zero_negative,
                              key_t<A>* agrees, std::int64_t n) {
  const key_t<A> up = mask_if<A>(zero_positive), down = mask_if<A>(zero_negative);
  for (std::int64_t i = 0; i < n; ++i) {
    const key_t<A> zero = mask_if<A>(votes[i] == 0);
    const key_t<A> positive = mask_if<A>(votes[i] > 0) | (zero & up);
    const key_t<A> negative = ~(mask_if<A>(votes[i] >= 0)) | (zero & down);
    agrees[i] = agreement(u[i], positive, negative);
  }
}

template <class A>
MK_CLONES void add_masked(A* sum, const A* v, const key_t<A>* mask, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] += masked(v[i], mask[i]);
}

template <class A>
MK_CLONES void count_masked(A* q, A weight, const key_t<A>* mask, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) q[i] += masked(weight, mask[i]);
}

template <class A>
MK_CLONES void take_larger(A* m, const A* v, const key_t<A>* mask, std::int64_t n) {
  using K = key_t<A>;
  for (std::int64_t i = 0; i < n; ++i) {
    const K take = mask_if<A>(magnitude_key(v[i]) > magnitude_key(m[i])) & mask[i];
    m[i] = bit_cast<A>(K((bit_cast<K>(v[i]) & take) | (bit_cast<K>(m[i]) & ~take)));
  }
}

template <class A>
MK_CLONES void take_where_alone(A* m, const A* single, const A* count, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) m[i] = count[i] == 1 ? single[i] : m[i];
}

template <class A>
MK_CLONES void divide(A* m, const A* q, A least, A instead, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) m[i] /= (q[i] < 0 ? -q[i] : q[i]) <= least ? instead : q[i];
}

template <class A>
MK_CLONES void spread_nan(A* m, const A* s, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) m[i] = s[i] != s[i] ? s[i] : m[i];
}

template <class T>
MK_CLONES void add_base(acc_t<T>* m, const T* base, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) m[i] = widen(base[i]) + m[i];
}

template <class T>
MK_CLONES void add_weighted(const T* x, const T* base, acc_t<T> weight, acc_t<T>* sum,
                            std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) sum[i] += (widen(x[i]) - widen(base[i])) * weight;
}

// The sum alone of the weighted deltas of one block, all of them kept.
template <class T>
void sum_block(const MergeDeltas& args, std::int64_t at, std::int64_t n, std::int64_t next,
               acc_t<T>* sum) {
  alignas(64) T gathered[kMergeBlock], gathered_base[kMergeBlock];
  prefetch_block<T>(*args.base, at + n, next);
  const T* base = read_block(*args.base, at, n, gathered_base);
  std::fill_n(sum, n, acc_t<T>(0));
  for (std::int64_t i = 0; i < args.n; ++i) {
    prefetch_block<T>(args.xs[i], at + n, next);
    add_weighted(read_block(args.xs[i], at, n, gathered), base, acc_t<T>(args.before[i]), sum, n);
  }
}

// The weighted deltas of one block, model i at u + i * kMergeBlock, and their sum.
template <class A>
void weigh_block(const MergeDeltas& args, std::int64_t at, std::int64_t n, A* u, A* sum) {
  const DType dtype = args.xs[0].dtype;
  alignas(64) A d[kMergeBlock];
  std::fill_n(sum, n, A(0));
  for (std::int64_t i = 0; i < args.n; ++i) {
    A* ui = u + i * kMergeBlock;
    delta_block(args.xs[i], {args.base, args.stepwise}, at, n, ui);
    if (args.stepwise) std::copy_n(ui, n, d);
    keep_block(args.keep[i], at, n, ui);
    if (args.stepwise) multiply_dropped(ui, d, n);
    if (args.stepwise && args.rescale[i] != 1) {
      args.divide ? divide_by(ui, A(args.rescale[i]), n) : multiply(ui, A(args.rescale[i]), n);
      round_block(dtype, ui, n);
    }
    multiply(ui, A(args.before[i]), n);
    if (args.stepwise) round_block(dtype, ui, n);
    add(sum, ui, n);
  }
  if (args.stepwise) round_block(dtype, sum, n);
}

template <class A>
void select(const MergeDeltas& args, const A* u, const A* votes, key_t<A>* agrees, std::int64_t n) {
  if (args.elect == Elect::present)
    select_present(u, agrees, n);
  else
    select_elected(u, votes, args.zero == Zero::positive, args.zero == Zero::negative, agrees, n);
}

// m and q of one block from its weighted deltas and their sum.
template <class A>
void combine_block(const MergeDeltas& args, std::int64_t n, A* u, const A* sum, A* m, A* q) {
  const DType dtype = args.xs[0].dtype;
  alignas(64) A votes[kMergeBlock], single[kMergeBlock];
  alignas(64) key_t<A> agrees[kMergeBlock];
  std::copy_n(sum, n, votes);
  if (args.elect == Elect::count) {
    std::fill_n(votes, n, A(0));
    for (std::int64_t i = 0; i < args.n; ++i) vote(u + i * kMergeBlock, votes, n);
  }
  std::fill_n(m, n, A(0));
  std::fill_n(q, n, A(0));
  std::fill_n(single, n, A(0));
  for (std::int64_t i = 0; i < args.n; ++i) {
    A* ui = u + i * kMergeBlock;
    select(args, ui, votes, agrees, n);
    count_masked(q, A(args.weights[i]), agrees, n);
    if (args.alone) {
      alignas(64) A scaled[kMergeBlock];
      std::copy_n(ui, n, scaled);
      multiply(scaled, A(args.alone[i]), n);
      add_masked(single, scaled, agrees, n);
    }
    if (args.after[i] != 1) {
      multiply(ui, A(args.after[i]), n);
      if (args.stepwise) round_block(dtype, ui, n);
    }
    if (args.max)
      take_larger(m, ui, agrees, n);
    else
      add_masked(m, ui, agrees, n);
  }
  if (args.elect == Elect::sum) spread_nan(m, sum, n);
  if (args.stepwise) round_block(dtype, m, n), round_block(dtype, q, n);
  if (args.normalize) divide(m, q, A(args.least), A(args.instead), n);
  if (args.alone) take_where_alone(m, single, q, n);
}

template <class T>
void run(const MergeDeltas& args, std::int64_t begin, std::int64_t end, acc_t<T>* u) {
  using A = acc_t<T>;
  const DType dtype = args.xs[0].dtype;
  alignas(64) T gathered[kMergeBlock];
  alignas(64) A sum[kMergeBlock], m[kMergeBlock], q[kMergeBlock];
  const bool plain = args.base && args.elect == Elect::everyone && !args.stepwise &&
                     std::all_of(args.keep, args.keep + args.n,
                                 [](const KeepRule& rule) { return rule.kind == Keep::all; });
  for (std::int64_t at = begin; at < end; at += kMergeBlock) {
    const std::int64_t n = std::min(kMergeBlock, end - at);
    if (plain)
      sum_block<T>(args, at, n, std::min(kMergeBlock, end - at - n), sum);
    else
      weigh_block(args, at, n, u, sum);
    if (args.elect == Elect::everyone) {
      std::copy_n(sum, n, m);
      std::fill_n(q, n, A(args.total));
      if (args.normalize) divide(m, q, A(args.least), A(args.instead), n);
    } else {
      combine_block(args, n, u, sum, m, q);
    }
    if (args.stepwise && args.normalize) round_block(dtype, m, n);
    if (!args.stepwise || args.scale != 1) multiply(m, A(args.scale), n);
    if (args.stepwise) round_block(dtype, m, n);
    if (args.base) add_base(m, read_block(*args.base, at, n, gathered), n);
    write_block(args.out, at, n, m);
  }
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

}  // namespace mk
