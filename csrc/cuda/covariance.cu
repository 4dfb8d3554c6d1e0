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
    const unsigned across = unsigned((features + kColumns - 1) / kColumns);
    block = blockIdx.x / across;
    column = blockIdx.x % across * std::int64_t(kColumns);
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
#pragma unroll 2
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

// Eight elements of 16 bits, in the upper halves; as many as there are before `count`. wide: p is a
// multiple of 16 bytes.
__device__ inline void write(std::uint16_t* p, const std::uint32_t (&bits)[kEight],
                             std::int64_t count, bool wide) {
  if (wide && count >= kEight) {
    std::uint32_t pairs[kEight / 2];
#pragma unroll
    for (int j = 0; j < kEight / 2; ++j)
      pairs[j] = __byte_perm(bits[2 * j], bits[2 * j + 1], 0x7632);
    // To the L2 cache, where it is read from next. (A plain store falls apart into four.)
    __stcg(reinterpret_cast<uint4*>(p), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    return;
  }
#pragma unroll
  for (int j = 0; j < kEight; ++j)
    if (j < count) p[j] = std::uint16_t(bits[j] >> 16);
}
__device__ inline Pack<float, kEight> read_eight(const float* p, std::int64_t count, bool wide) {
  Pack<float, kEight> x;
  if (wide && count >= kEight) {
    x.read(global(p));
  } else {
#pragma unroll
    for (int j = 0; j < kEight; ++j) x.v[j] = j < count ? p[j] : 0;
  }
  return x;
}

// Values of a square by way of shared memory, so that they are read along rows or features, and
// written along features.
constexpr int kPadded = kColumns + 4;

template <class T, bool kSplit>
__global__ void __launch_bounds__(kThreads) pack_kernel(const FeatureRows rows, const Packed to) {
  constexpr int kOf = kSplit ? kParts : 1;
  float* shared = dynamic_shared<float>();
  const Place in(rows.stride != 1), out(false);
  const Square square(to.end - rows.at);
  const std::int64_t begin = square.column, from = square.block * kLanes;
  float v[kEight] = {};
  if (from + in.row < rows.n) read<T>(rows, from + in.row, begin + in.column, v);
#pragma unroll
  for (int j = 0; j < kEight; ++j) shared[in.row * kPadded + in.column + j] = v[j];
  __syncthreads();

  const std::int64_t row = from + out.row, column = begin + out.column, at = rows.at + column;
  Pack<float, kEight> scale, shift;  // 0 where there is no feature
  if (kSplit) {
    scale = read_eight(to.scale + at, rows.width - column, to.wide);
    shift = read_eight(to.shift + at, rows.width - column, to.wide);
  }
  std::uint32_t bits[kOf][kEight];  // in the upper halves
  const std::int64_t panel = (rows.at + begin) / kPanel;
  bool more = false, more_next = false;  // of that panel, and of the one behind it
#pragma unroll
  for (int j = 0; j < kEight; ++j) {
    float x = shared[out.row * kPadded + out.column + j];
    if constexpr (kSplit) {
      x = row < rows.n ? add(mul(x, scale.v[j]), -shift.v[j]) : 0;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        bits[part][j] = __float_as_uint(upper(x));
        x = add(x, -upper(x));
        const bool next = (at + j) / kPanel > panel;
        if (part == 0) more |= x != 0 && !next, more_next |= x != 0 && next;
      }
    } else {
      T same;
      store(x, &same);
      bits[0][j] = std::uint32_t(same.bits) << 16;
    }
  }
  if (row < rows.n) {
#pragma unroll
    for (int part = 0; part < kOf; ++part)
      write(static_cast<std::uint16_t*>(to.to) + (part * rows.n + row) * to.padded + at, bits[part],
            to.end - at, to.wide);
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
    auto kernel = pack_kernel<T, true>;
    if constexpr (sizeof(T) == 2) kernel = to.split ? kernel : pack_kernel<T, false>;
    launch(kernel, grid, kThreads, kLanes * kPadded * sizeof(float), stream, rows, to);
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
