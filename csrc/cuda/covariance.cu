#include "common.cuh"
#include "covariance.cuh"

namespace mk::cuda {
namespace {

constexpr int kEight = 8;     // features of a thread
constexpr int kLanes = 32;    // rows that a block takes side by side
constexpr int kColumns = 64;  // features of a block
static_assert(kLanes * kColumns == kThreads * kEight, "a block takes a square at a time");
constexpr std::uint32_t kInfinity = 0x7f800000u;  // its bits; those of NaN are above

__device__ inline std::uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Blocks of kColumns features are neighbours, then those of rows.
struct Square {
  std::int64_t column, block;
  __device__ explicit Square(std::int64_t features) {
    const std::int64_t across = (features + kColumns - 1) / kColumns;
    block = blockIdx.x / across;
    column = (blockIdx.x - block * across) * kColumns;
  }
};
unsigned squares_of(std::int64_t features, std::int64_t rows, int of_rows) {
  return unsigned((features + kColumns - 1) / kColumns * ((rows + of_rows - 1) / of_rows));
}

// Where a thread stands in the square. Neighbours take what lies side by side: features, or where
// these are strided, rows.
struct Place {
  int row, column;
  __device__ explicit Place(bool along_rows)
      : row(int(along_rows ? threadIdx.x % kLanes : threadIdx.x / (kColumns / kEight))),
        column(int(along_rows ? threadIdx.x / kLanes : threadIdx.x % (kColumns / kEight)) *
               kEight) {}
};

// Eight features of a row, zeros past the last of them.
template <class T>
__device__ inline void read(const FeatureRows& rows, std::int64_t row, std::int64_t column,
                            float (&v)[kEight]) {
  const T* p = global(static_cast<const T*>(rows.x)) + rows.offsets[row];
  Pack<T, kEight> x;
  if (rows.wide && column + kEight <= rows.width) {
    x.read(p + column);
  } else {
#pragma unroll
    for (int j = 0; j < kEight; ++j)
      x.v[j] = column + j < rows.width ? p[(column + j) * rows.stride] : T{};
  }
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    v[j] = load(x.v[j]);
    if (rows.zero && magnitude(v[j]) >= kInfinity) v[j] = 0;
  }
}

// The sum of each column over the lanes, in order; thread c has that of column c.
template <class V, class Join>
__device__ inline V over_lanes(Place place, const V (&v)[kEight], Join join) {
  V* shared = dynamic_shared<V>();
  __syncthreads();  // what was there before has been read
#pragma unroll
  for (int j = 0; j < kEight; ++j) shared[place.row * kColumns + place.column + j] = v[j];
  __syncthreads();
  V total{};
  if (threadIdx.x < kColumns)
    for (int lane = 0; lane < kLanes; ++lane)
      total = join(total, shared[lane * kColumns + threadIdx.x]);
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    measure_kernel(const FeatureRows rows, const Measured to) {
  const Place place(rows.stride != 1);
  const Square square(rows.width);
  const std::int64_t column = square.column + place.column, from = square.block * kMeasured;
  const std::int64_t stop = from + kMeasured < rows.n ? from + kMeasured : rows.n;
  float first[kEight];
  read<T>(rows, 0, column, first);
  if (square.block == 0 && place.row == 0)
    for (int j = 0; j < kEight; ++j)
      if (column + j < rows.width) to.first[rows.at + column + j] = first[j];
  double sums[kEight] = {}, powers[kEight] = {};
  std::uint32_t largest[kEight] = {};
#pragma unroll 4
  for (std::int64_t row = from + place.row; row < stop; row += kLanes) {
    float v[kEight];
    read<T>(rows, row, column, v);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const double centred = double(v[j]) - double(first[j]);
      largest[j] = max(largest[j], magnitude(v[j]));
      sums[j] += centred;
      powers[j] = __fma_rn(centred, centred, powers[j]);
    }
  }
  const auto plus = [](double a, double b) { return a + b; };
  const double sum = over_lanes(place, sums, plus), power = over_lanes(place, powers, plus);
  const std::uint32_t key =
      over_lanes(place, largest, [](std::uint32_t a, std::uint32_t b) { return max(a, b); });
  const std::int64_t feature = square.column + threadIdx.x;
  if (threadIdx.x >= kColumns || feature >= rows.width) return;
  const std::int64_t blocks = (rows.n + kMeasured - 1) / kMeasured;
  const std::int64_t cell = square.block * rows.side + rows.at + feature;
  to.sums[cell] = sum;
  to.sums[blocks * rows.side + cell] = power;
  to.largest[cell] = key;
}

// A float32 whose lower 16 bits are cut off: exact in bfloat16, and x - upper(x) is exact.
__device__ inline float upper(float x) { return __uint_as_float(__float_as_uint(x) & 0xffff0000u); }

// Eight elements, as many as there are before `end`.
template <class T>
__device__ inline void write(T* p, const Pack<T, kEight>& x, std::int64_t count) {
  if (count >= kEight && std::uintptr_t(p) % 16 == 0) {
    x.write(p);
    return;
  }
#pragma unroll
  for (int j = 0; j < kEight; ++j)
    if (j < count) p[j] = x.v[j];
}

// Values of a square by way of shared memory, so that they are read along rows or features, and
// written along features.
constexpr int kPadded = kColumns + 4;

template <class T, bool kSplit>
__global__ void __launch_bounds__(kThreads) pack_kernel(const FeatureRows rows, const Packed to) {
  float* shared = dynamic_shared<float>();
  const Place in(rows.stride != 1), out(false);
  const Square square(to.end - rows.at);
  const std::int64_t begin = square.column, from = square.block * kLanes;
  float v[kEight] = {};
  if (from + in.row < rows.n) read<T>(rows, from + in.row, begin + in.column, v);
#pragma unroll
  for (int j = 0; j < kEight; ++j) shared[in.row * kPadded + in.column + j] = v[j];
  __syncthreads();

  using Out = std::conditional_t<kSplit, bf16, T>;
  const std::int64_t row = from + out.row, column = begin + out.column, at = rows.at + column;
  Pack<Out, kEight> parts[kSplit ? kParts : 1];
  const std::int64_t panel = (rows.at + begin) / kPanel;
  bool more = false, more_next = false;  // of that panel, and of the one behind it
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    float x = shared[out.row * kPadded + out.column + j];
    if (kSplit) {
      const bool there = row < rows.n && column + j < rows.width;
      x = there ? add(mul(x, to.scale[at + j]), -to.shift[at + j]) : 0;
    }
#pragma unroll
    for (int part = 0; part < (kSplit ? kParts : 1); ++part) {
      const float high = kSplit ? upper(x) : x;
      store(high, &parts[part].v[j]);
      x = add(x, -high);
      const bool next = (at + j) / kPanel > panel;
      if (part == 0) more |= x != 0 && !next, more_next |= x != 0 && next;
    }
  }
  if (row < rows.n) {
#pragma unroll
    for (int part = 0; part < (kSplit ? kParts : 1); ++part)
      write(static_cast<Out*>(to.to) + (part * rows.n + row) * to.padded + at, parts[part],
            to.end - at);
  }
  if (!kSplit) return;
  int* deep = to.deep + from / kShallowRows * to.panels + panel;
  if (__syncthreads_or(more) && threadIdx.x == 0) atomicMax(deep, 1);
  if (__syncthreads_or(more_next) && threadIdx.x == 0) atomicMax(deep + 1, 1);
}

// Two neighbours of a tile each thread.
__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeProducts args) {
  const std::int64_t tile = blockIdx.x, count = args.count;
  const int at = int(blockIdx.y * kThreads + threadIdx.x) * 2;
  const std::int64_t i = std::int64_t(args.tiles[tile]) * kPanel + at / args.width;
  const std::int64_t j = std::int64_t(args.tiles[count + tile]) * args.width + at % args.width;
  if (i >= args.width_x) return;
  const std::int64_t cells = std::int64_t(kPanel) * args.width;
  const double* of = args.sums + tile * cells + at;
  double totals[2] = {};
#pragma unroll 4
  for (int split = 0; split < args.splits; ++split) {
    const double2 sums = *reinterpret_cast<const double2*>(of + split * count * cells);
    totals[0] += sums.x;
    totals[1] += sums.y;
  }
  const double *x = args.x + i, *y = args.y;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const std::int64_t k = j + e;
    if (k >= args.width_y || (args.triangle && i > k)) continue;
    double total = mul(mul(totals[e], x[0]), y[k]);
    if (args.first) {
      const double between = mul(x[2 * args.width_x], y[args.width_y + k]);
      total = add(total, add(between, -mul(x[4 * args.width_x], y[3 * args.width_y + k])));
    }
    double* to = args.products + i * args.width_y + k;
    *to = add(*to, total);
  }
}

template <class F>
void with_narrow_type(DType dtype, F&& f) {
  with_type(dtype, [&](auto* x) {
    if constexpr (!std::is_same_v<decltype(x), double*>) f(x);
  });
}

}  // namespace

cudaError_t covariance_measure(const FeatureRows& rows, const Measured& to, int device,
                               cudaStream_t stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const unsigned grid = squares_of(rows.width, rows.n, kMeasured);
  with_narrow_type(rows.dtype, [&](auto* x) {
    launch(measure_kernel<std::remove_pointer_t<decltype(x)>>, grid, kThreads,
           kLanes * kColumns * sizeof(double), stream, rows, to);
  });
  return cudaGetLastError();
}

cudaError_t covariance_pack(const FeatureRows& rows, const Packed& to, int device,
                            cudaStream_t stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const unsigned grid = squares_of(to.end - rows.at, rows.n, kLanes);
  with_narrow_type(rows.dtype, [&](auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    launch(to.split ? pack_kernel<T, true> : pack_kernel<T, false>, grid, kThreads,
           kLanes * kPadded * sizeof(float), stream, rows, to);
  });
  return cudaGetLastError();
}

cudaError_t covariance_merge(const MergeProducts& args, int device, cudaStream_t stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const dim3 grid(unsigned(args.count), unsigned(kPanel * args.width / 2 / kThreads));
  launch(merge_kernel, grid, kThreads, 0, stream, args);
  return cudaGetLastError();
}

}  // namespace mk::cuda
