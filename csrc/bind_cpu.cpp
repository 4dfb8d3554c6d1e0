// Module mergekern._cpu: the only file of it that includes pybind11.
//
// Every function takes plain pointers, sizes and enums by keyword, releases the GIL (kernels touch
// no Python object) and works on a range, so that callers split work over threads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <vector>

#include "gram.h"
#include "kth_magnitude.h"
#include "merge_deltas.h"
#include "permute.h"
#include "weighted_rows.h"
#include "weighted_sum.h"

namespace py = pybind11;
using namespace pybind11::literals;
using std::int64_t;
using std::uint64_t;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

mk::View make_view(Address data, mk::DType dtype, const std::vector<int64_t>& shape,
                   const std::vector<int64_t>& strides, bool stream) {
  require(shape.size() == strides.size(), "View: shape and strides differ in length");
  require(shape.size() <= std::size_t(mk::kMaxDims), "View: too many dimensions");
  mk::View view{at<void>(data), dtype, int(shape.size()), {}, {}, stream};
  std::copy(shape.begin(), shape.end(), view.shape);
  std::copy(strides.begin(), strides.end(), view.strides);
  return view;
}

void weighted_sum(const mk::View& out, const std::vector<mk::View>& xs,
                  const std::vector<double>& weights, double divisor, int64_t begin, int64_t end) {
  require(!xs.empty() && xs.size() == weights.size(), "weighted_sum: one weight per input");
  mk::weighted_sum({out, xs.data(), weights.data(), int64_t(xs.size()), divisor}, begin, end);
}

void weighted_rows(const mk::View& out, const std::vector<mk::View>& xs, Address weights, int64_t k,
                   int64_t inner, int64_t begin, int64_t end) {
  require(!xs.empty() && k >= 1 && inner >= 1, "weighted_rows: no input, row or element of a row");
  mk::weighted_rows({out, xs.data(), at<const double>(weights), int64_t(xs.size()), k, inner},
                    begin, end);
}

void merge_deltas(const mk::View& out, const std::optional<mk::View>& base,
                  const std::vector<mk::View>& xs, const std::vector<double>& weights,
                  const std::vector<double>& factors, const std::vector<mk::KeepRule>& keep,
                  mk::Elect elect, bool normalize, double total, double scale, Address scratch,
                  int64_t begin, int64_t end) {
  require(!xs.empty() && xs.size() == weights.size() && xs.size() == factors.size() &&
              xs.size() == keep.size(),
          "merge_deltas: one weight, factor and rule per input");
  mk::merge_deltas({out, base ? &*base : nullptr, xs.data(), weights.data(), factors.data(),
                    keep.data(), int64_t(xs.size()), elect, normalize, total, scale},
                   begin, end, at<void>(scratch));
}

void l1_norms(const mk::View& x, const std::optional<mk::View>& base, const mk::KeepRule& keep,
              Address sums, int64_t begin, int64_t end) {
  mk::l1_norms(x, base ? &*base : nullptr, keep, begin, end, at<double>(sums));
}

void gram(const std::vector<mk::View>& xs, const std::optional<mk::View>& base, Address scratch,
          Address dots, int64_t begin, int64_t end) {
  require(!xs.empty(), "gram: no inputs");
  mk::gram({xs.data(), int64_t(xs.size()), base ? &*base : nullptr}, begin, end,
           at<double>(scratch), at<double>(dots));
}

mk::Magnitudes magnitudes(const mk::View& x, const std::optional<mk::View>& base) {
  return {x, base ? &*base : nullptr};
}

void magnitude_keys(const mk::View& x, const std::optional<mk::View>& base, Address out,
                    int64_t begin, int64_t end) {
  mk::magnitude_keys(magnitudes(x, base), begin, end, at<void>(out));
}

void sample_keys(const mk::View& x, const std::optional<mk::View>& base, int64_t total,
                 int64_t runs, int64_t run, Address out, int64_t begin, int64_t end) {
  require(runs > 0 && run > 0 && total / runs >= run, "sample_keys: more runs than elements");
  mk::sample_keys(magnitudes(x, base), total, runs, run, begin, end, at<void>(out));
}

auto bracket_count(const mk::View& x, const std::optional<mk::View>& base, uint64_t low,
                   uint64_t high, Address kept, int64_t capacity, int64_t begin, int64_t end) {
  require(low <= high, "bracket_count: low is above high");
  const mk::BracketCount c =
      mk::bracket_count(magnitudes(x, base), begin, end, low, high, at<void>(kept), capacity);
  return std::make_tuple(c.above, c.at_high, c.inside, c.at_low);
}

void digit_histogram(const mk::View& x, const std::optional<mk::View>& base, uint64_t prefix,
                     int shift, Address histogram, int64_t begin, int64_t end) {
  mk::digit_histogram(magnitudes(x, base), begin, end, prefix, shift, at<int64_t>(histogram));
}

void pattern_histogram(const mk::View& x, Address histogram, int64_t begin, int64_t end) {
  require(x.dtype == mk::DType::f16 || x.dtype == mk::DType::bf16,
          "pattern_histogram: only for 16-bit types");
  mk::pattern_histogram(x, begin, end, at<int64_t>(histogram));
}

int64_t find_key(const mk::View& x, const std::optional<mk::View>& base, uint64_t key, int64_t rank,
                 int64_t begin, int64_t end) {
  return mk::find_key(magnitudes(x, base), begin, end, key, rank);
}

// axes: (size, stride in elements, address of int64 offsets or 0) for each axis of the result.
void permute(Address out, Address x, int64_t itemsize,
             const std::vector<std::tuple<int64_t, int64_t, Address>>& axes, bool stream,
             Address positions, int64_t row_size, Address scratch, int64_t begin, int64_t end) {
  require(!axes.empty() && axes.size() <= std::size_t(mk::kMaxDims),
          "permute: no dimensions, or too many");
  mk::Permute args{};
  args.out = at<void>(out);
  args.x = at<const void>(x);
  args.itemsize = itemsize;
  args.ndim = int(axes.size());
  args.stream = stream;
  args.positions = at<const std::int32_t>(positions);
  args.row_size = row_size;
  for (std::size_t d = 0; d < axes.size(); ++d) {
    const auto& [size, stride, offsets] = axes[d];
    args.axes[d] = {size, stride, at<const int64_t>(offsets)};
  }
  mk::permute(args, begin, end, at<void>(scratch));
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  const py::kw_only kw;

  py::enum_<mk::DType>(m, "DType")
      .value("f32", mk::DType::f32)
      .value("f64", mk::DType::f64)
      .value("f16", mk::DType::f16)
      .value("bf16", mk::DType::bf16);
  py::enum_<mk::Elect>(m, "Elect")
      .value("none", mk::Elect::none)
      .value("sum", mk::Elect::sum)
      .value("count", mk::Elect::count);

  py::class_<mk::View>(m, "View").def(py::init(&make_view), kw, "data"_a, "dtype"_a, "shape"_a,
                                      "strides"_a, "stream"_a = false);
  py::class_<mk::KeepRule>(m, "KeepRule")
      .def(py::init<>())
      .def_static(
          "magnitude",
          [](uint64_t threshold, int64_t cut) {
            return mk::KeepRule{mk::Keep::magnitude, threshold, cut, {0, 0}, 0};
          },
          kw, "threshold"_a, "cut"_a)
      .def_static(
          "random",
          [](std::uint32_t k0, std::uint32_t k1, std::uint32_t limit) {
            return mk::KeepRule{mk::Keep::random, 0, 0, {k0, k1}, limit};
          },
          kw, "k0"_a, "k1"_a, "limit"_a);

  m.attr("BLOCK") = mk::kBlock;
  m.attr("MERGE_BLOCK") = mk::kMergeBlock;
  m.attr("GRAM_BLOCK") = mk::kGramBlock;

  m.def("weighted_sum", &weighted_sum, no_gil, kw, "out"_a, "xs"_a, "weights"_a, "divisor"_a,
        "begin"_a, "end"_a);
  m.def("weighted_rows", &weighted_rows, no_gil, kw, "out"_a, "xs"_a, "weights"_a, "k"_a, "inner"_a,
        "begin"_a, "end"_a);
  m.def("merge_deltas", &merge_deltas, no_gil, kw, "out"_a, "base"_a, "xs"_a, "weights"_a,
        "factors"_a, "keep"_a, "elect"_a, "normalize"_a, "total"_a, "scale"_a, "scratch"_a,
        "begin"_a, "end"_a);
  m.def("l1_norms", &l1_norms, no_gil, kw, "x"_a, "base"_a, "keep"_a, "sums"_a, "begin"_a, "end"_a);
  m.def("gram", &gram, no_gil, kw, "xs"_a, "base"_a, "scratch"_a, "dots"_a, "begin"_a, "end"_a);
  m.def("magnitude_keys", &magnitude_keys, no_gil, kw, "x"_a, "base"_a, "out"_a, "begin"_a,
        "end"_a);
  m.def("sample_keys", &sample_keys, no_gil, kw, "x"_a, "base"_a, "total"_a, "runs"_a, "run"_a,
        "out"_a, "begin"_a, "end"_a);
  m.def("bracket_count", &bracket_count, no_gil, kw, "x"_a, "base"_a, "low"_a, "high"_a, "kept"_a,
        "capacity"_a, "begin"_a, "end"_a);
  m.def("digit_histogram", &digit_histogram, no_gil, kw, "x"_a, "base"_a, "prefix"_a, "shift"_a,
        "histogram"_a, "begin"_a, "end"_a);
  m.def("pattern_histogram", &pattern_histogram, no_gil, kw, "x"_a, "histogram"_a, "begin"_a,
        "end"_a);
  m.def("find_key", &find_key, no_gil, kw, "x"_a, "base"_a, "key"_a, "rank"_a, "begin"_a, "end"_a);
  m.def("permute", &permute, no_gil, kw, "out"_a, "x"_a, "itemsize"_a, "axes"_a, "stream"_a,
        "positions"_a, "row_size"_a, "scratch"_a, "begin"_a, "end"_a);
}
