#include "deltas.cuh"

namespace mk::cuda {
namespace {

template <class A>
struct Numbers {
  A total, least, instead, scale;
};

// u of eight elements of a model.
template <class T, bool kStepwise>
__device__ inline void terms(const MergeTable& args, const acc_t<T>* factors, const Eight<T>& x,
                             const Eight<T>& base, std::uint32_t kept, acc_t<T> (&u)[kEight]) {
  using A = acc_t<T>;
  difference<T, kStepwise>(x, base, args.deltas.base, u);
  const A before = factors[0];
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    u[j] = bit_of(kept, j) ? u[j] : kStepwise ? mul(u[j], A(0)) : A(0);
    if (kStepwise) {
      const A rescale = factors[1];
      u[j] = step<T, kStepwise>(args.divide ? div(u[j], rescale) : mul(u[j], rescale));
    }
    u[j] = step<T, kStepwise>(mul(u[j], before));
  }
}

template <class A>
__device__ inline bool takes_part(A u, A vote, Elect elect, Zero zero) {
  if (elect == Elect::present) return u != A(0);
  const bool positive = zero == Zero::positive ? vote >= A(0) : vote > A(0);
  const bool negative = zero == Zero::negative ? !(vote > A(0)) : !(vote >= A(0));
  return (positive && !(u <= A(0))) || (negative && !(u >= A(0)));
}

template <class Out, class A>
__device__ inline void write_as(const MergeTable& args, const A (&m)[kEight], std::int64_t at) {
  const std::int64_t numel = args.deltas.numel;
  Out* p = global(static_cast<Out*>(args.out)) + at;
  Eight<Out> y;
#pragma unroll
  for (int j = 0; j < kEight; ++j) store(m[j], &y.v[j]);
  if (args.wide_out && numel - at >= kEight) return y.write(p);
#pragma unroll
  for (int j = 0; j < kEight; ++j)
    if (at + j < numel) p[j] = y.v[j];
}
template <class A>
__device__ inline void write_eight(const MergeTable& args, const A (&m)[kEight], std::int64_t at) {
  switch (args.out_dtype) {
    case DType::f32:
      return write_as<float>(args, m, at);
    case DType::f64:
      return write_as<double>(args, m, at);
    case DType::f16:
      return write_as<f16>(args, m, at);
    case DType::bf16:
      return write_as<bf16>(args, m, at);
  }
}

// The models whose elements are in registers at a time, 64 bytes: more would leave room for one
// block of threads on a multiprocessor, too few loads on their way. An election reads and keeps the
// models a second time where there are more, from the first cache.
template <class T>
constexpr int kHeldOf = 8 / sizeof(T);

// Eight elements of all models, from load to store.
template <class T, bool kElects, bool kStepwise>
class Merge {
  using A = acc_t<T>;
  static constexpr int kHeld = kHeldOf<T>;

 public:
  __device__ Merge(const MergeTable& args, std::int64_t at) : args_(args), at_(at) {
    const DeltaTable& d = args.deltas;
    if (d.base) base_ = read_eight<T>(d.base, at, d.numel, d.wide);
  }

  __device__ void run(const Numbers<A>& numbers) {
    A s[kEight] = {}, m[kEight], q[kEight], alone[kEight] = {};
    const bool counts = kElects && args_.elect == Elect::count;  // s is then of signs
    each_model(true, [&](const A(&u)[kEight], const A*) {
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        s[j] = add(s[j], counts ? A((u[j] > A(0)) - (u[j] < A(0))) : u[j]);
      }
    });
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      if (!counts) s[j] = step<T, kStepwise>(s[j]);
      q[j] = kElects ? A(0) : numbers.total;
      m[j] = kElects ? A(0) : s[j];
    }
    if (kElects) {
      elect(s, m, q, alone);
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        if (args_.elect == Elect::sum && s[j] != s[j]) m[j] = s[j];
        m[j] = step<T, kStepwise>(m[j]), q[j] = step<T, kStepwise>(q[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      if (args_.normalize) {
        const A size = q[j] < A(0) ? -q[j] : q[j];
        m[j] = step<T, kStepwise>(div(m[j], size <= numbers.least ? numbers.instead : q[j]));
      }
      if (kElects && args_.alone && q[j] == A(1)) m[j] = alone[j];
      m[j] = step<T, kStepwise>(mul(m[j], numbers.scale));
      if (args_.deltas.base) m[j] = add(load(base_.v[j]), m[j]);
    }
    write_eight(args_, m, at_);
  }

 private:
  __device__ void elect(const A (&votes)[kEight], A (&m)[kEight], A (&q)[kEight],
                        A (&alone)[kEight]) {
    each_model(false, [&](const A(&u)[kEight], const A* factors) {
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        if (!takes_part(u[j], votes[j], args_.elect, args_.zero)) continue;
        const A v = step<T, kStepwise>(mul(u[j], factors[2]));
        if (!args_.max)
          m[j] = add(m[j], v);
        else if (key_of(v) > key_of(m[j]))
          m[j] = v;
        q[j] = add(q[j], factors[3]);
        if (args_.alone) alone[j] = add(alone[j], mul(u[j], factors[4]));
      }
    });
  }

  // f(u, factors) of every model in order; `anew`: nothing is held yet.
  template <class F>
  __device__ void each_model(bool anew, F f) {
    const DeltaTable& d = args_.deltas;
    const A* factors = static_cast<const A*>(args_.factors);
#pragma unroll 1
    for (std::int64_t i = 0; i < d.n; i += kHeld) {
      if (anew || d.n > kHeld) hold(i);
#pragma unroll
      for (int b = 0; b < kHeld; ++b) {
        if (i + b >= d.n) break;
        A u[kEight];
        terms<T, kStepwise>(args_, factors + 5 * (i + b), x_[b], base_, kept_[b], u);
        f(u, factors + 5 * (i + b));
      }
    }
  }

  __device__ void hold(std::int64_t i) {
    const DeltaTable& d = args_.deltas;
#pragma unroll
    for (int b = 0; b < kHeld; ++b)
      if (i + b < d.n) x_[b] = read_eight<T>(d.rules[i + b].x, at_, d.numel, d.wide);
#pragma unroll
    for (int b = 0; b < kHeld; ++b) {
      if (i + b >= d.n) break;
      A v[kEight];
      difference<T, kStepwise>(x_[b], base_, d.base, v);
      kept_[b] = kept_eight(d.rules[i + b], v, at_, d.numel);
    }
  }

  const MergeTable& args_;
  const std::int64_t at_;
  Eight<T> base_, x_[kHeld];
  std::uint32_t kept_[kHeld];
};

// Two blocks on a multiprocessor: 128 registers a thread. float64 would spill some of them.
template <class T, bool kElects, bool kStepwise>
__global__ void __launch_bounds__(kThreads, sizeof(acc_t<T>) == 4 ? 2 : 1)
    merge_deltas_kernel(const MergeTable args, const Numbers<acc_t<T>> numbers) {
  const std::int64_t at = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) * kEight;
  if (at < args.deltas.numel) Merge<T, kElects, kStepwise>(args, at).run(numbers);
}

template <class T, bool kElects, bool kStepwise>
void enqueue(const MergeTable& args, cudaStream_t stream) {
  using A = acc_t<T>;
  const Numbers<A> numbers{A(args.total), A(args.least), A(args.instead), A(args.scale)};
  const std::int64_t tiles = (args.deltas.numel + kDeltaTile - 1) / kDeltaTile;
  launch(merge_deltas_kernel<T, kElects, kStepwise>, unsigned(tiles), kThreads, 0, stream, args,
         numbers);
}

}  // namespace

cudaError_t merge_deltas(const MergeTable& args, int device, cudaStream_t stream) {
  if (args.deltas.numel == 0) return cudaSuccess;
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  with_type(args.deltas.dtype, [&](auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    const bool elects = args.elect != Elect::everyone, stepwise = args.deltas.rounded;
    if (elects)
      stepwise ? enqueue<T, true, true>(args, stream) : enqueue<T, true, false>(args, stream);
    else
      stepwise ? enqueue<T, false, true>(args, stream) : enqueue<T, false, false>(args, stream);
  });
  return cudaGetLastError();
}

}  // namespace mk::cuda
