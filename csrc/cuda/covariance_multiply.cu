#include "covariance.cuh"
#include "tensor_cores.cuh"

namespace mk::cuda {
namespace {

constexpr int kChunk = 8;              // elements of 16 bytes
constexpr int kStageRows = kDeepRows;  // of x and y that a stage of the pipeline holds
static_assert(kShallowRows % kStageRows == 0, "a run is a whole number of stages");

// Rows of panels in shared memory, as `kStages` stages. Rows of 128 or 256 bytes would all begin in
// the same banks: chunk c of row r lies at c ^ r % 8, so that eight rows of a matrix lie apart.
template <bool kDeep, int kWidth>
struct Stage {
  static constexpr int kStages = kDeep ? 2 : 4;
  static constexpr int kOf = kDeep ? kParts : 1;
  static constexpr int kX = kStageRows * kPanel, kY = kStageRows * kWidth;
  static constexpr int kElements = kOf * (kX + kY);
  static constexpr int kBytes = kStages * kElements * 2;

  __device__ static int x(int part, int row, int chunk) {
    return part * kX + row * kPanel + (chunk ^ row % 8) * kChunk;
  }
  __device__ static int y(int part, int row, int chunk) {
    return kOf * kX + part * kY + row * kWidth + (chunk ^ row % 8) * kChunk;
  }
};

// (high, low) + x: Knuth's sum without loss, its error added to `low`.
__device__ inline void promote(float& high, float& low, float x) {
  const float total = add(high, x), back = add(total, -high);
  const float error = add(add(high, -add(total, -back)), add(x, -back));
  high = total;
  low = add(low, error);
}

// A tile of kPanel x kWidth products by eight warps, of 64 x 32 or 32 x 32 each.
template <class T, bool kDeep, int kWidth>
class Tile {
  using In = Stage<kDeep, kWidth>;
  static constexpr int kAcross = kWidth / 32;                // warps side by side
  static constexpr int kHigh = kPanel * kAcross / (8 * 16);  // fragments of a warp: of 16 of x,
  static constexpr int kSteps = kStageRows / 16;             // of 8 of y, and of 16 rows

 public:
  __device__ Tile(const Multiply& args, std::uint16_t* shared)
      : args_(args),
        shared_(shared),
        a_(args.tiles[blockIdx.x]),
        b_(args.tiles[args.count + blockIdx.x]),
        begin_(blockIdx.y * args.span),
        stop_(begin_ + args.span < args.n ? begin_ + args.span : args.n),
        first_x_(int(threadIdx.x) / 32 / kAcross * kHigh * 16),
        first_y_(int(threadIdx.x) / 32 % kAcross * 32) {}

  __device__ void run() {
    std::int64_t fetched = taken(begin_), row = fetched;
    for (int s = 0; s < In::kStages - 1; ++s) {
      fetch(fetched, s);
      fetched = next(fetched);
    }
    int stage = 0;
#pragma unroll 1
    while (row < stop_) {
      copy_wait<In::kStages - 2>();
      __syncthreads();  // all have copied this stage, and read the one before it
      fetch(fetched, stage == 0 ? In::kStages - 1 : stage - 1);
      fetched = next(fetched);
      multiply(shared_ + stage * In::kElements);
      const std::int64_t end = row + kStageRows;
      if (kDeep || end % kShallowRows == 0 || end >= stop_) promote_all();
      row = next(row);
      stage = stage + 1 == In::kStages ? 0 : stage + 1;
    }
  }

  __device__ void store() const {
    const int lane = int(threadIdx.x) % 32;
    const std::int64_t tile = std::int64_t(blockIdx.y) * args_.count + blockIdx.x;
    double* to = args_.sums + tile * kPanel * kWidth + (first_x_ + lane / 4) * kWidth + first_y_ +
                 lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const double2 sums{double(high_[i][j][e]) + double(low_[i][j][e]),
                             double(high_[i][j][e + 1]) + double(low_[i][j][e + 1])};
          *reinterpret_cast<double2*>(to + (i * 16 + e * 4) * kWidth + j * 8) = sums;
        }
  }

 private:
  // The first row of a run that is multiplied, from `row` on.
  __device__ std::int64_t taken(std::int64_t row) const {
    while (args_.mixed && row < stop_) {
      const std::int64_t run = row / kShallowRows;
      const int deep = args_.deep_x[run * args_.panels_x + a_] |
                       args_.deep_y[run * args_.panels_y + b_ * kWidth / kPanel];
      if (bool(deep) == kDeep) break;
      row += kShallowRows;
    }
    return row;
  }
  __device__ std::int64_t next(std::int64_t row) const {
    row += kStageRows;
    return row % kShallowRows == 0 ? taken(row) : row;
  }

  // The rows of a stage on their way as a group; zeros from row `stop_` on.
  __device__ void fetch(std::int64_t row, int stage) {
    std::uint16_t* to = shared_ + stage * In::kElements;
    if (row < stop_) {
      const auto* x = static_cast<const std::uint16_t*>(args_.x) + a_ * kPanel;
      const auto* y = static_cast<const std::uint16_t*>(args_.y) + b_ * kWidth;
#pragma unroll
      for (int part = 0; part < In::kOf; ++part) {
        copy<kPanel>(x + (part * args_.n + row) * args_.padded_x, args_.padded_x, stop_ - row,
                     [&](int r, int c) { return to + In::x(part, r, c); });
        copy<kWidth>(y + (part * args_.n + row) * args_.padded_y, args_.padded_y, stop_ - row,
                     [&](int r, int c) { return to + In::y(part, r, c); });
      }
    }
    copy_commit();
  }
  template <int kColumns, class To>
  __device__ static void copy(const std::uint16_t* from, std::int64_t padded, std::int64_t rows,
                              To to) {
    constexpr int kChunks = kColumns / kChunk;
#pragma unroll
    for (int i = 0; i < kStageRows * kChunks / kThreads; ++i) {
      const int at = i * kThreads + int(threadIdx.x), r = at / kChunks, c = at % kChunks;
      copy_async(to(r, c), from + r * padded + c * kChunk, r < rows);
    }
  }

  // Rows [16 step, 16 step + 16) of a part.
  __device__ void read_x(const std::uint16_t* stage, int part, int step,
                         std::uint32_t (&x)[kHigh][4]) const {
    const int lane = int(threadIdx.x) % 32, row = step * 16 + lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
      load_transposed(x[i], stage + In::x(part, row, first_x_ / 8 + i * 2 + lane / 8 % 2));
  }
  __device__ void read_y(const std::uint16_t* stage, int part, int step,
                         std::uint32_t (&y)[2][4]) const {
    const int lane = int(threadIdx.x) % 32, row = step * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      load_transposed(y[j], stage + In::y(part, row, first_y_ / 8 + j * 2 + lane / 16));
  }
  __device__ void multiply_step(const std::uint32_t (&x)[kHigh][4],
                                const std::uint32_t (&y)[2][4]) {
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        multiply_add<T>(total_[i][j], x[i], y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]);
  }
  __device__ void multiply(const std::uint16_t* stage) {
    std::uint32_t x[In::kOf][kSteps][kHigh][4], y[In::kOf][kSteps][2][4];
#pragma unroll
    for (int part = 0; part < In::kOf; ++part)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        read_x(stage, part, step, x[part][step]);
        read_y(stage, part, step, y[part][step]);
      }
    // Small products first, which are cut off less beside a small sum.
    constexpr int kOrder[6][2] = {{0, 2}, {2, 0}, {1, 1}, {0, 1}, {1, 0}, {0, 0}};
#pragma unroll
    for (int product = kDeep ? 0 : 5; product < 6; ++product)
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        multiply_step(x[kOrder[product][0]][step], y[kOrder[product][1]][step]);
  }
  __device__ void promote_all() {
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          promote(high_[i][j][e], low_[i][j][e], total_[i][j][e]);
          total_[i][j][e] = 0;
        }
  }

  const Multiply& args_;
  std::uint16_t* shared_;
  std::int64_t a_, b_, begin_, stop_;
  int first_x_, first_y_;  // of the warp, within the tile
  float total_[kHigh][4][4] = {}, high_[kHigh][4][4] = {}, low_[kHigh][4][4] = {};
};

template <class T, bool kDeep, int kWidth>
__global__ void __launch_bounds__(kThreads, 1) multiply_kernel(const Multiply args) {
  Tile<T, kDeep, kWidth> tile(args, dynamic_shared<std::uint16_t>());
  tile.run();
  tile.store();
}

template <class T, bool kDeep, int kWidth>
cudaError_t enqueue(const Multiply& args, cudaStream_t stream) {
  constexpr int kBytes = Stage<kDeep, kWidth>::kBytes;
  const auto kernel = multiply_kernel<T, kDeep, kWidth>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  launch(kernel, dim3(unsigned(args.count), unsigned(args.splits)), kThreads, kBytes, stream, args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t covariance_multiply(const Multiply& args, int device, cudaStream_t stream) {
  const OnDevice guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (args.deep) return enqueue<bf16, true, kSplitWidth>(args, stream);
  if (args.width == kSplitWidth) return enqueue<bf16, false, kSplitWidth>(args, stream);
  return args.dtype == DType::f16 ? enqueue<f16, false, kPanel>(args, stream)
                                  : enqueue<bf16, false, kPanel>(args, stream);
}

}  // namespace mk::cuda
