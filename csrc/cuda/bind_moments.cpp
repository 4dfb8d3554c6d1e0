// Functions of gram, coefficient_gradients and covariance in module mergekern._cuda; bind_cuda.cpp
// calls bind_moments.
#include <pybind11/pybind11.h>

#include "bind_common.h"
#include "coefficient_gradients.cuh"
#include "covariance.cuh"
#include "gram.cuh"

namespace py = pybind11;
using namespace pybind11::literals;
using std::int64_t;

namespace {

void gram_dots(Address partial, Address matrices, Address firsts, mk::DType dtype,
               mk::cuda::GramSet set, bool based, bool wide, int64_t sets, int64_t n, int64_t rows,
               int64_t width, int chunk, int64_t chunks, int lanes, int device, Address stream) {
  require(sets >= 1 && n >= 1 && rows >= 1 && width >= 1, "gram: needs inputs and a size");
  require(rows * chunks * lanes / 256 < kBlocks / sets, "gram: more rows than a grid has room for");
  const mk::cuda::GramDots args{at<double>(partial),
                                at<const mk::cuda::GramMatrix>(matrices),
                                at<const int64_t>(firsts),
                                dtype,
                                set,
                                based,
                                wide,
                                sets,
                                n,
                                rows,
                                width,
                                chunk,
                                chunks,
                                lanes};
  check(mk::cuda::gram_dots(args, device, at<CUstream_st>(stream)), "gram", device,
        std::to_string(n) + " inputs of " + std::to_string(rows) + " x " + std::to_string(width) +
            " elements");
}

void gram_sums(Address out, Address partial, Address pairs, int64_t n, int64_t rows, int64_t chunks,
               int64_t count, int lanes, int device, Address stream) {
  require(count >= 1 && rows >= 1 && chunks >= 1, "gram: needs pairs and a size");
  require(count < kBlocks / rows, "gram: more rows than a grid has room for");
  const mk::cuda::GramSums args{at<double>(out),
                                at<const double>(partial),
                                at<const int64_t>(pairs),
                                n,
                                rows,
                                chunks,
                                count,
                                lanes};
  check(mk::cuda::gram_sums(args, device, at<CUstream_st>(stream)), "gram", device,
        std::to_string(count) + " pairs of " + std::to_string(rows) + " rows");
}

void coefficient_gradients(Address partial, Address grad, Address xs, mk::DType grad_dtype,
                           mk::DType dtype, bool based, bool wide, int64_t n, int64_t numel,
                           int64_t chunk, int64_t chunks, int device, Address stream) {
  require(n >= 1 && numel >= 1, "coefficient_gradients: needs inputs and a size");
  require(grad_dtype == mk::DType::f32 || grad_dtype == mk::DType::f64,
          "coefficient_gradients: grad is float32 or float64");
  require(chunk % 8 == 0 && chunk * chunks >= numel, "coefficient_gradients: chunks leave a rest");
  require(chunks < kBlocks / ((n - 1) / mk::cuda::kTogether + 1),
          "coefficient_gradients: more chunks than a grid has room for");
  const mk::cuda::CoefficientGradients args{at<double>(partial),
                                            at<const void>(grad),
                                            at<const int64_t>(xs),
                                            grad_dtype,
                                            dtype,
                                            based,
                                            wide,
                                            n,
                                            numel,
                                            chunk,
                                            chunks};
  check(mk::cuda::coefficient_gradients(args, device, at<CUstream_st>(stream)),
        "coefficient_gradients", device,
        std::to_string(n) + " inputs of " + std::to_string(numel) + " elements");
}

std::string sizes_of(const mk::cuda::FeatureRows& rows) {
  return std::to_string(rows.n) + " rows of " + std::to_string(rows.width) + " features";
}

mk::cuda::FeatureRows feature_rows(Address x, mk::DType dtype, Address offsets, int64_t n,
                                   int64_t width, int64_t stride, int64_t at_feature, int64_t side,
                                   bool zero, bool wide) {
  require(dtype != mk::DType::f64, "FeatureRows: float64 has no tensor cores here");
  require(n >= 1 && width >= 1, "FeatureRows: needs rows and features");
  require((width + 191) / 64 * (n / 32 + 1) < kBlocks,
          "FeatureRows: more than a grid has room for");
  return {at<void>(x), dtype, at<const int64_t>(offsets), n, width, stride, at_feature, side,
          zero,        wide};
}

void measure(const mk::cuda::FeatureRows& rows, Address first, Address sums, Address largest,
             int device, Address stream) {
  const mk::cuda::Measured to{at<double>(first), at<double>(sums), at<std::uint32_t>(largest)};
  check(mk::cuda::covariance_measure(rows, to, device, at<CUstream_st>(stream)), "covariance",
        device, sizes_of(rows));
}

void pack(const mk::cuda::FeatureRows& rows, Address to, Address deep, Address shift, Address scale,
          int64_t end, int64_t padded, int64_t panels, bool split, int device, Address stream) {
  require(split || rows.dtype != mk::DType::f32, "covariance: float32 is packed in parts");
  require(rows.at + rows.width <= end && end <= padded, "covariance: more features than packed");
  const bool wide = to % 16 == 0 && rows.at % 8 == 0;
  const mk::cuda::Packed packed{at<void>(to),
                                at<int>(deep),
                                at<const float>(shift),
                                at<const float>(scale),
                                end,
                                padded,
                                panels,
                                split,
                                wide};
  check(mk::cuda::covariance_pack(rows, packed, device, at<CUstream_st>(stream)), "covariance",
        device, sizes_of(rows));
}

void multiply(Address sums, Address tiles, Address x, Address y, Address deep_x, Address deep_y,
              mk::DType dtype, int64_t n, int64_t span, int64_t padded_x, int64_t padded_y,
              int64_t panels_x, int64_t panels_y, int count, int splits, int width, bool mixed,
              bool deep, int device, Address stream) {
  require(count >= 1 && splits >= 1 && splits < 1 << 16, "covariance: needs tiles and splits");
  require(width == mk::cuda::kPanel || width == mk::cuda::kSplitWidth, "covariance: no such width");
  require(span % mk::cuda::kShallowRows == 0, "covariance: a split is a whole number of runs");
  const mk::cuda::Multiply args{at<double>(sums),
                                at<const std::int32_t>(tiles),
                                at<const void>(x),
                                at<const void>(y),
                                at<const int>(deep_x),
                                at<const int>(deep_y),
                                dtype,
                                n,
                                span,
                                padded_x,
                                padded_y,
                                panels_x,
                                panels_y,
                                count,
                                splits,
                                width,
                                mixed,
                                deep};
  check(mk::cuda::covariance_multiply(args, device, at<CUstream_st>(stream)), "covariance", device,
        std::to_string(count) + " tiles of " + std::to_string(n) + " rows");
}

void merge_products(Address products, Address sums, Address tiles, Address x, Address y,
                    int64_t width_x, int64_t width_y, int count, int splits, int width,
                    bool triangle, bool first, int device, Address stream) {
  const mk::cuda::MergeProducts args{at<double>(products),
                                     at<const double>(sums),
                                     at<const std::int32_t>(tiles),
                                     at<const double>(x),
                                     at<const double>(y),
                                     width_x,
                                     width_y,
                                     count,
                                     splits,
                                     width,
                                     triangle,
                                     first};
  check(mk::cuda::covariance_merge(args, device, at<CUstream_st>(stream)), "covariance", device,
        std::to_string(width_x) + " x " + std::to_string(width_y) + " products");
}

}  // namespace

void bind_moments(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  const py::kw_only kw;

  py::enum_<mk::cuda::GramSet>(m, "GramSet")
      .value("two", mk::cuda::GramSet::two)
      .value("four", mk::cuda::GramSet::four)
      .value("cross", mk::cuda::GramSet::cross);
  m.attr("GRAM_SUMMED") = mk::cuda::kSummed;
  m.def("gram_dots", &gram_dots, no_gil, kw, "partial"_a, "matrices"_a, "firsts"_a, "dtype"_a,
        "set"_a, "based"_a, "wide"_a, "sets"_a, "n"_a, "rows"_a, "width"_a, "chunk"_a, "chunks"_a,
        "lanes"_a, "device"_a, "stream"_a);
  m.def("gram_sums", &gram_sums, no_gil, kw, "out"_a, "partial"_a, "pairs"_a, "n"_a, "rows"_a,
        "chunks"_a, "count"_a, "lanes"_a, "device"_a, "stream"_a);

  m.def("coefficient_gradients", &coefficient_gradients, no_gil, kw, "partial"_a, "grad"_a, "xs"_a,
        "grad_dtype"_a, "dtype"_a, "based"_a, "wide"_a, "n"_a, "numel"_a, "chunk"_a, "chunks"_a,
        "device"_a, "stream"_a);

  py::class_<mk::cuda::FeatureRows>(m, "FeatureRows")
      .def(py::init(&feature_rows), kw, "x"_a, "dtype"_a, "offsets"_a, "n"_a, "width"_a, "stride"_a,
           "at"_a, "side"_a, "zero"_a, "wide"_a);
  m.attr("TILE") = mk::cuda::kPanel;
  m.attr("SPLIT_WIDTH") = mk::cuda::kSplitWidth;
  m.attr("SHALLOW_ROWS") = mk::cuda::kShallowRows;
  m.attr("DEEP_ROWS") = mk::cuda::kDeepRows;
  m.attr("PARTS") = mk::cuda::kParts;
  m.attr("MEASURED") = mk::cuda::kMeasured;
  m.def("measure", &measure, no_gil, "rows"_a, kw, "first"_a, "sums"_a, "largest"_a, "device"_a,
        "stream"_a);
  m.def("pack", &pack, no_gil, "rows"_a, kw, "to"_a, "deep"_a, "shift"_a, "scale"_a, "end"_a,
        "padded"_a, "panels"_a, "split"_a, "device"_a, "stream"_a);
  m.def("multiply", &multiply, no_gil, kw, "sums"_a, "tiles"_a, "x"_a, "y"_a, "deep_x"_a,
        "deep_y"_a, "dtype"_a, "n"_a, "span"_a, "padded_x"_a, "padded_y"_a, "panels_x"_a,
        "panels_y"_a, "count"_a, "splits"_a, "width"_a, "mixed"_a, "deep"_a, "device"_a,
        "stream"_a);
  m.def("merge_products", &merge_products, no_gil, kw, "products"_a, "sums"_a, "tiles"_a, "x"_a,
        "y"_a, "width_x"_a, "width_y"_a, "count"_a, "splits"_a, "width"_a, "triangle"_a, "first"_a,
        "device"_a, "stream"_a);
}
