#include "common.cuh"
#include "zip_weights.cuh"

namespace mk::cuda {
namespace {

static_assert(kZipTile == kThreads, "a thread takes one pack or element of a tile");

// On a multiprocessor at once. Without it the compiler keeps to fewer registers, and spills some
// where it divides.
constexpr int kBlocks = 4;

// The rows of a group.
struct Members {
  const std::int64_t* list;  // nullptr: numbers themselves
  std::int64_t begin, end;
  __device__ Members(const ZipInput& x, std::int64_t g)
      : list(x.members),
        begin(x.starts ? global(x.starts)[g] : g),
        end(x.starts ? global(x.starts)[g + 1] : g + 1) {}
  __device__ std::int64_t row(std::int64_t k) const { return list ? global(list)[k] : k; }
};

// part[j] = the products of N columns from `column` on, added over the rows of a group, the first
// as it is; -0 without rows.
template <class T, int N>
__device__ inline void sum_rows(const ZipInput& input, const Members& rows, std::int64_t column,
                                sum_t<T> (&part)[N]) {
  using A = sum_t<T>;
  const A factor = A(input.factor);
  const T* const x = global(static_cast<const T*>(input.x)) + column;
#pragma unroll
  for (int j = 0; j < N; ++j) part[j] = A(-0.0);
#pragma unroll 1
  for (std::int64_t k = rows.begin; k < rows.end; ++k) {
    const T* const from = x + rows.row(k) * input.row_stride;
    if constexpr (N == 1) {
      part[0] = add(part[0], mul(A(load(*from)), factor));
    } else {
      Pack<T, N> values;
      values.read(from);
#pragma unroll
      for (int j = 0; j < N; ++j) part[j] = add(part[j], mul(A(load(values.v[j])), factor));
    }
  }
}

__device__ inline std::int64_t divisor_at(const Zip& zip, std::int64_t g, std::int64_t column) {
  return zip.by_row ? g : column;
}

// Columns stay, and divisors are of rows; N columns to a thread.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kBlocks)
    rows_kernel(const Zip* __restrict__ zips, const int* __restrict__ owners) {
  using A = sum_t<T>;
  const Zip& zip = zips[owners[blockIdx.x]];
  const std::int64_t at = ((blockIdx.x - zip.first) * kThreads + threadIdx.x) * N;
  if (at >= zip.numel) return;
  const Divisor width(zip.width, zip.inverse);
  const std::int64_t g = width.quotient(at), column = at - g * width.by;
  const ZipInput* const inputs = global(zip.inputs);
  A total[N];
#pragma unroll
  for (int j = 0; j < N; ++j) total[j] = A(-0.0);
#pragma unroll 1
  for (std::int64_t i = 0; i < zip.n; ++i) {
    A part[N];
    sum_rows<T>(inputs[i], Members(inputs[i], g), column, part);
#pragma unroll
    for (int j = 0; j < N; ++j) total[j] = add(total[j], part[j]);
  }
  T* const out = global(static_cast<T*>(zip.out)) + at;
  const A divisor = A(global(zip.divisors)[g]);
  if constexpr (N == 1) {
    store(div(total[0], divisor), out);
  } else {
    Pack<T, N> y;
#pragma unroll
    for (int j = 0; j < N; ++j) store(div(total[j], divisor), &y.v[j]);
    y.write(out);
  }
}

// Columns move; one element to a thread, read where it is.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gather_kernel(const Zip* __restrict__ zips, const int* __restrict__ owners) {
  using A = sum_t<T>;
  const Zip& zip = zips[owners[blockIdx.x]];
  const std::int64_t at = (blockIdx.x - zip.first) * kThreads + threadIdx.x;
  if (at >= zip.numel) return;
  const Divisor width(zip.width, zip.inverse), inner(zip.inner, zip.inverse_inner);
  const std::int64_t g = width.quotient(at), column = at - g * width.by;
  const std::int64_t h = inner.quotient(column), within = column - h * inner.by;
  const ZipInput* const inputs = global(zip.inputs);
  A total = A(-0.0);
#pragma unroll 1
  for (std::int64_t i = 0; i < zip.n; ++i) {
    const ZipInput& input = inputs[i];
    const Members rows(input, g);
    const auto* const starts = global(static_cast<const std::int64_t*>(input.column_starts));
    const auto* const members = global(static_cast<const std::int64_t*>(input.column_members));
#pragma unroll 1
    for (std::int64_t k = starts[h]; k < starts[h + 1]; ++k) {
      A part[1];
      sum_rows<T>(input, rows, members[k] * inner.by + within, part);
      total = add(total, part[0]);
    }
  }
  const A divisor = A(global(zip.divisors)[divisor_at(zip, g, h)]);
  store(div(total, divisor), global(static_cast<T*>(zip.out)) + at);
}

// Sums over the rows of group g of one input, all columns, into shared memory.
template <class T>
__device__ inline void stage(const ZipInput& input, std::int64_t g, sum_t<T>* parts) {
  constexpr int N = 16 / sizeof(T);
  const Members rows(input, g);
  const int width = int(input.width);
  const bool wide = (reinterpret_cast<std::uintptr_t>(input.x) | input.row_stride * sizeof(T) |
                     width * sizeof(T)) %
                        16 ==
                    0;
  if (wide) {
    for (int c = threadIdx.x * N; c < width; c += kThreads * N) {
      Pack<sum_t<T>, N> part;
      sum_rows<T>(input, rows, c, part.v);
      part.write(parts + c);
    }
  } else {
    for (int c = threadIdx.x; c < width; c += kThreads) {
      sum_t<T> part[1];
      sum_rows<T>(input, rows, c, part);
      parts[c] = part[0];
    }
  }
}

// Columns of a row that a thread adds up at the same time: inputs are staged once for so many.
constexpr int kOwn = 16;

template <class T>
__global__ void __launch_bounds__(kThreads)
    staged_kernel(const Zip* __restrict__ zips, const int* __restrict__ owners) {
  using A = sum_t<T>;
  const Zip& zip = zips[owners[blockIdx.x]];
  const std::int64_t g = blockIdx.x - zip.first;
  const int width = int(zip.width), inner = int(zip.inner);
  const ZipInput* const inputs = global(zip.inputs);
  const double* const divisors = global(zip.divisors);
  T* const out = global(static_cast<T*>(zip.out)) + g * width;
  A* const parts = dynamic_shared<A>();
  for (int begin = threadIdx.x; begin - int(threadIdx.x) < width; begin += kThreads * kOwn) {
    A total[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) total[j] = A(-0.0);
#pragma unroll 1
    for (std::int64_t i = 0; i < zip.n; ++i) {
      __syncthreads();  // the input before was read by all
      stage<T>(inputs[i], g, parts);
      __syncthreads();
      const int* const starts = global(static_cast<const int*>(inputs[i].column_starts));
      const int* const members = global(static_cast<const int*>(inputs[i].column_members));
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int column = begin + j * kThreads;
        if (column >= width) break;
        const int h = inner == 1 ? column : column / inner, within = column - h * inner;
        const int end = starts[h + 1];
#pragma unroll 1
        for (int k = starts[h]; k < end; ++k)
          total[j] = add(total[j], parts[members[k] * inner + within]);
      }
    }
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int column = begin + j * kThreads;
      if (column >= width) break;
      const std::int64_t d = divisor_at(zip, g, zip.by_row ? 0 : column / inner);
      store(div(total[j], A(divisors[d])), out + column);
    }
  }
}

template <class T>
void enqueue(const ZipWeights& args, cudaStream_t stream) {
  const auto kernel = args.zipping == Zipping::packs    ? rows_kernel<T, 16 / sizeof(T)>
                      : args.zipping == Zipping::stay   ? rows_kernel<T, 1>
                      : args.zipping == Zipping::gather ? gather_kernel<T>
                                                        : staged_kernel<T>;
  const bool staged = args.zipping == Zipping::staged;
  launch(kernel, unsigned(args.tiles), kThreads, std::size_t(staged ? args.shared : 0), stream,
         args.zips, args.owners);
}

}  // namespace

cudaError_t zip_weights(const ZipWeights& args, int device, cudaStream_t stream) {
  if (args.tiles == 0) return cudaSuccess;
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  with_type(args.dtype,
            [&](auto* x) { enqueue<std::remove_pointer_t<decltype(x)>>(args, stream); });
  return cudaGetLastError();
}

}  // namespace mk::cuda
