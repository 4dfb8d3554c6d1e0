// Module mergekern._cpu; only its bind_*.cpp files include pybind11.
//
// Every function takes plain pointers, sizes and enums by keyword, releases the GIL (kernels touch
// no Python object) and works on a range, so that callers split work over threads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "bind_common.h"
#include "coefficient_gradients.h"
#include "gram.h"
#include "kth_magnitude.h"
#include "merge_deltas.h"
#include "permute.h"
#include "rank_mask.h"
#include "variance_mask.h"
#include "weighted_rows.h"
#include "weighted_sum.h"

void bind_zip_weights(pybind11::module_& m);

namespace py = pybind11;
using namespace pybind11::literals;
using std::int64_t;
using std::uint64_t;

void bind_covariance(py::module_& m);

namespace {

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

// Task vectors as selection and masks take them: the views live as long as the object.
struct KeySource {
  std::vector<mk::View> xs;
  std::optional<mk::View> base;
  bool rounded, variance;
  mk::Magnitudes get() const {
    return {xs.data(), int64_t(xs.size()), {base ? &*base : nullptr, rounded}, variance};
  }
};

KeySource make_source(const std::vector<mk::View>& xs, const std::optional<mk::View>& base,
                      bool rounded, bool variance) {
  require(!xs.empty() && (variance || xs.size() == 1), "KeySource: one tensor, or a variance");
  return {xs, base, rounded, variance};
}

// The numbers of a merge that do not depend on the range.
struct Recipe {
  std::vector<mk::KeepRule> keep;
  std::vector<double> before, after, weights, alone, rescale;
  mk::Elect elect;
  mk::Zero zero;
  bool max, normalize, stepwise, divide;
  double total, least, instead, scale;
};

void merge_deltas(const mk::View& out, const std::optional<mk::View>& base,
                  const std::vector<mk::View>& xs, const Recipe& r, Address scratch, int64_t begin,
                  int64_t end) {
  const std::size_t n = xs.size();
  require(n && r.keep.size() == n && r.before.size() == n && r.after.size() == n &&
              r.weights.size() == n && r.rescale.size() == n &&
              (r.alone.empty() || r.alone.size() == n),
          "merge_deltas: one rule and one of each factor per input");
  mk::merge_deltas({out,
                    base ? &*base : nullptr,
                    xs.data(),
                    r.keep.data(),
                    r.before.data(),
                    r.after.data(),
                    r.weights.data(),
                    r.alone.empty() ? nullptr : r.alone.data(),
                    r.rescale.data(),
                    int64_t(n),
                    r.elect,
                    r.zero,
                    r.max,
                    r.normalize,
                    r.stepwise,
                    r.divide,
                    r.total,
                    r.least,
                    r.instead,
                    r.scale},
                   begin, end, at<void>(scratch));
}

void l1_norms(const std::vector<mk::View>& xs, const std::optional<mk::View>& base, bool rounded,
              const std::vector<mk::KeepRule>& keep, Address sums, int64_t begin, int64_t end) {
  require(!xs.empty() && keep.size() == xs.size(), "l1_norms: one rule per input");
  mk::l1_norms(xs.data(), int64_t(xs.size()), {base ? &*base : nullptr, rounded}, keep.data(),
               begin, end, at<double>(sums));
}

void count_kept(const std::vector<mk::View>& xs, const std::optional<mk::View>& base, bool rounded,
                const std::vector<mk::KeepRule>& keep, Address counts, int64_t begin, int64_t end) {
  require(!xs.empty() && keep.size() == xs.size(), "count_kept: one rule per input");
  mk::count_kept(xs.data(), int64_t(xs.size()), {base ? &*base : nullptr, rounded}, keep.data(),
                 begin, end, at<int64_t>(counts));
}

mk::RankMask make_rank_mask(const KeySource& source, int64_t units, int64_t length, int64_t inner,
                            Address limits, std::uint32_t k0, std::uint32_t k1, int64_t first,
                            Address bits) {
  require(!source.variance, "rank_mask: ranks magnitudes");
  return {source.xs[0],
          source.get().from,
          units,
          length,
          inner,
          at<const std::uint32_t>(limits),
          {k0, k1},
          first,
          at<std::uint8_t>(bits)};
}

void variance_mask(const KeySource& source, bool all, uint64_t threshold, int64_t cut, Address bits,
                   Address squares, int64_t begin, int64_t end) {
  require(source.variance && begin % 8 == 0, "variance_mask: a variance, from a whole byte on");
  mk::variance_mask({source.get(), all, threshold, cut, at<std::uint8_t>(bits)}, begin, end,
                    at<double>(squares));
}

void gram(const std::vector<mk::View>& xs, const std::optional<mk::View>& base, Address scratch,
          Address dots, int64_t begin, int64_t end) {
  require(!xs.empty(), "gram: no inputs");
  mk::gram({xs.data(), int64_t(xs.size()), base ? &*base : nullptr}, begin, end,
           at<double>(scratch), at<double>(dots));
}

void gram_rows(const std::vector<mk::View>& xs, const std::optional<mk::View>& base, int64_t width,
               Address scratch, Address dots, int64_t begin, int64_t end) {
  require(!xs.empty(), "gram_rows: no inputs");
  mk::gram_rows({xs.data(), int64_t(xs.size()), base ? &*base : nullptr}, width, begin, end,
                at<double>(scratch), at<double>(dots));
}

void gram_columns(const std::vector<mk::View>& xs, const std::optional<mk::View>& base,
                  int64_t length, Address scratch, Address dots, int64_t begin, int64_t end) {
  require(!xs.empty(), "gram_columns: no inputs");
  for (const mk::View& x : xs) require(x.ndim == 2 && x.strides[1] == 1, "gram_columns: no matrix");
  require(!base || (base->ndim == 2 && base->strides[1] == 1), "gram_columns: base is no matrix");
  mk::gram_columns({xs.data(), int64_t(xs.size()), base ? &*base : nullptr}, length, begin, end,
                   at<double>(scratch), at<double>(dots));
}

void coefficient_gradients(const mk::View& grad, const std::vector<mk::View>& xs,
                           const std::optional<mk::View>& base, Address scratch, Address dots,
                           int64_t begin, int64_t end) {
  require(!xs.empty(), "coefficient_gradients: no inputs");
  mk::coefficient_gradients({&grad, xs.data(), int64_t(xs.size()), base ? &*base : nullptr}, begin,
                            end, at<double>(scratch), at<double>(dots));
}

void magnitude_keys(const KeySource& source, Address out, int64_t begin, int64_t end) {
  mk::magnitude_keys(source.get(), begin, end, at<void>(out));
}

void sample_keys(const KeySource& source, int64_t total, int64_t runs, int64_t run, Address out,
                 int64_t begin, int64_t end) {
  require(runs > 0 && run > 0 && total / runs >= run, "sample_keys: more runs than elements");
  mk::sample_keys(source.get(), total, runs, run, begin, end, at<void>(out));
}

// brackets: (source, low, high) side by side by source; bracket i keeps keys from
// kept + i * capacity keys on and its four counts from counts + 4 i on.
void bracket_count(const std::vector<const KeySource*>& sources,
                   const std::vector<std::tuple<int64_t, uint64_t, uint64_t>>& brackets,
                   Address kept, int64_t capacity, Address counts, int64_t begin, int64_t end) {
  std::vector<mk::Magnitudes> magnitudes;
  for (const KeySource* source : sources) magnitudes.push_back(source->get());
  std::vector<mk::Bracket> all;
  for (const auto& [of, low, high] : brackets) {
    require(low <= high && of >= 0 && of < int64_t(sources.size()), "bracket_count: bad bracket");
    const int64_t width = sources[std::size_t(of)]->xs[0].dtype == mk::DType::f64 ? 8 : 4;
    all.push_back(
        {of, low, high, at<char>(kept) + int64_t(all.size()) * capacity * width, capacity, {}});
  }
  mk::bracket_count(magnitudes.data(), all.data(), int64_t(all.size()), begin, end);
  int64_t* row = at<int64_t>(counts);
  for (const mk::Bracket& b : all)
    for (int64_t count : {b.count.above, b.count.at_high, b.count.inside, b.count.at_low})
      *row++ = count;
}

void digit_histogram(const KeySource& source, uint64_t prefix, int shift, int lanes,
                     Address histogram, int64_t begin, int64_t end) {
  require(lanes == 1 || lanes == 4, "digit_histogram: 1 or 4 lanes");
  mk::digit_histogram(source.get(), begin, end, prefix, shift, lanes, at<int64_t>(histogram));
}

void pattern_histogram(const mk::View& x, Address histogram, int64_t begin, int64_t end) {
  require(x.dtype == mk::DType::f16 || x.dtype == mk::DType::bf16,
          "pattern_histogram: only for 16-bit types");
  mk::pattern_histogram(x, begin, end, at<int64_t>(histogram));
}

int64_t find_key(const KeySource& source, uint64_t key, int64_t rank, int64_t begin, int64_t end) {
  return mk::find_key(source.get(), begin, end, key, rank);
}

// axes: (size, stride in elements, address of int64 offsets or 0) for each axis of the result.
mk::Permute make_permute(Address out, Address x, int64_t itemsize,
                         const std::vector<std::tuple<int64_t, int64_t, Address>>& axes,
                         bool stream, Address positions, int64_t row_size) {
  require(!axes.empty() && axes.size() <= std::size_t(mk::kMaxDims),
          "Permute: no dimensions, or too many");
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
  return args;
}

}  // namespace

void bind_zip_match(py::module_& m);

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  const py::kw_only kw;

  py::enum_<mk::DType>(m, "DType")
      .value("f32", mk::DType::f32)
      .value("f64", mk::DType::f64)
      .value("f16", mk::DType::f16)
      .value("bf16", mk::DType::bf16);
  py::enum_<mk::Elect>(m, "Elect")
      .value("everyone", mk::Elect::everyone)
      .value("present", mk::Elect::present)
      .value("sum", mk::Elect::sum)
      .value("count", mk::Elect::count);
  py::enum_<mk::Zero>(m, "Zero")
      .value("positive", mk::Zero::positive)
      .value("negative", mk::Zero::negative)
      .value("none", mk::Zero::none);

  py::class_<mk::View>(m, "View").def(py::init(&make_view), kw, "data"_a, "dtype"_a, "shape"_a,
                                      "strides"_a, "stream"_a = false);
  py::class_<mk::KeepRule>(m, "KeepRule")
      .def(py::init<>())
      .def_static(
          "interval",
          [](uint64_t low, int64_t low_cut, uint64_t high, int64_t high_cut) {
            mk::KeepRule rule{mk::Keep::interval};
            rule.low = low, rule.low_cut = low_cut, rule.high = high, rule.high_cut = high_cut;
            return rule;
          },
          kw, "low"_a, "low_cut"_a, "high"_a, "high_cut"_a)
      .def_static(
          "random",
          [](std::uint32_t k0, std::uint32_t k1, std::uint32_t limit, int64_t first) {
            mk::KeepRule rule{mk::Keep::random};
            rule.key = {k0, k1}, rule.limit = limit, rule.first = first;
            return rule;
          },
          kw, "k0"_a, "k1"_a, "limit"_a, "first"_a)
      .def_static(
          "bits",
          [](Address bits) {
            mk::KeepRule rule{mk::Keep::bits};
            rule.bits = at<const std::uint8_t>(bits);
            return rule;
          },
          kw, "bits"_a);
  py::class_<KeySource>(m, "KeySource")
      .def(py::init(&make_source), kw, "xs"_a, "base"_a, "rounded"_a = false, "variance"_a = false);
  py::class_<Recipe>(m, "Recipe")
      .def(py::init([](std::vector<mk::KeepRule> keep, std::vector<double> before,
                       std::vector<double> after, std::vector<double> weights,
                       std::vector<double> alone, std::vector<double> rescale, mk::Elect elect,
                       mk::Zero zero, bool max, bool normalize, bool stepwise, bool divide,
                       double total, double least, double instead, double scale) {
             return Recipe{std::move(keep),
                           std::move(before),
                           std::move(after),
                           std::move(weights),
                           std::move(alone),
                           std::move(rescale),
                           elect,
                           zero,
                           max,
                           normalize,
                           stepwise,
                           divide,
                           total,
                           least,
                           instead,
                           scale};
           }),
           kw, "keep"_a, "before"_a, "after"_a, "weights"_a, "alone"_a, "rescale"_a, "elect"_a,
           "zero"_a, "max"_a, "normalize"_a, "stepwise"_a, "divide"_a, "total"_a, "least"_a,
           "instead"_a, "scale"_a);
  py::class_<mk::RankMask>(m, "RankMask")
      .def(py::init(&make_rank_mask), kw, "source"_a, "units"_a, "length"_a, "inner"_a, "limits"_a,
           "k0"_a, "k1"_a, "first"_a, "bits"_a, py::keep_alive<1, 2>())
      .def_property_readonly("scratch_bytes", &mk::rank_mask_scratch);

  py::class_<mk::Permute>(m, "Permute")
      .def(py::init(&make_permute), kw, "out"_a, "x"_a, "itemsize"_a, "axes"_a, "stream"_a,
           "positions"_a, "row_size"_a);

  m.attr("BLOCK") = mk::kBlock;
  m.attr("MERGE_BLOCK") = mk::kMergeBlock;
  m.attr("GRAM_BLOCK") = mk::kGramBlock;
  m.attr("GRAM_LANES") = mk::kGramLanes;
  m.attr("MASK_UNITS") = mk::kMaskUnits;

  m.def("weighted_sum", &weighted_sum, no_gil, kw, "out"_a, "xs"_a, "weights"_a, "divisor"_a,
        "begin"_a, "end"_a);
  m.def("weighted_rows", &weighted_rows, no_gil, kw, "out"_a, "xs"_a, "weights"_a, "k"_a, "inner"_a,
        "begin"_a, "end"_a);
  m.def("merge_deltas", &merge_deltas, no_gil, kw, "out"_a, "base"_a, "xs"_a, "recipe"_a,
        "scratch"_a, "begin"_a, "end"_a);
  m.def("l1_norms", &l1_norms, no_gil, kw, "xs"_a, "base"_a, "rounded"_a, "keep"_a, "sums"_a,
        "begin"_a, "end"_a);
  m.def("count_kept", &count_kept, no_gil, kw, "xs"_a, "base"_a, "rounded"_a, "keep"_a, "counts"_a,
        "begin"_a, "end"_a);
  m.def(
      "rank_mask",
      [](const mk::RankMask& args, Address scratch, Address sums, int64_t begin, int64_t end) {
        require(begin % mk::kMaskUnits == 0, "rank_mask: from whole bytes on");
        mk::rank_mask(args, begin, end, at<void>(scratch), at<double>(sums));
      },
      no_gil, kw, "args"_a, "scratch"_a, "sums"_a, "begin"_a, "end"_a);
  m.def("variance_mask", &variance_mask, no_gil, kw, "source"_a, "all"_a, "threshold"_a, "cut"_a,
        "bits"_a, "squares"_a, "begin"_a, "end"_a);
  m.def("gram", &gram, no_gil, kw, "xs"_a, "base"_a, "scratch"_a, "dots"_a, "begin"_a, "end"_a);
  m.def("gram_rows", &gram_rows, no_gil, kw, "xs"_a, "base"_a, "width"_a, "scratch"_a, "dots"_a,
        "begin"_a, "end"_a);
  m.def("gram_columns", &gram_columns, no_gil, kw, "xs"_a, "base"_a, "length"_a, "scratch"_a,
        "dots"_a, "begin"_a, "end"_a);
  m.def("gram_scratch", &mk::gram_scratch, kw, "n"_a);
  m.def("coefficient_gradients", &coefficient_gradients, no_gil, kw, "grad"_a, "xs"_a, "base"_a,
        "scratch"_a, "dots"_a, "begin"_a, "end"_a);
  m.def("magnitude_keys", &magnitude_keys, no_gil, kw, "source"_a, "out"_a, "begin"_a, "end"_a);
  m.def("sample_keys", &sample_keys, no_gil, kw, "source"_a, "total"_a, "runs"_a, "run"_a, "out"_a,
        "begin"_a, "end"_a);
  m.def("bracket_count", &bracket_count, no_gil, kw, "sources"_a, "brackets"_a, "kept"_a,
        "capacity"_a, "counts"_a, "begin"_a, "end"_a);
  m.def("digit_histogram", &digit_histogram, no_gil, kw, "source"_a, "prefix"_a, "shift"_a,
        "lanes"_a, "histogram"_a, "begin"_a, "end"_a);
  m.def("pattern_histogram", &pattern_histogram, no_gil, kw, "x"_a, "histogram"_a, "begin"_a,
        "end"_a);
  m.def("find_key", &find_key, no_gil, kw, "source"_a, "key"_a, "rank"_a, "begin"_a, "end"_a);
  m.def(
      "permute",
      [](const mk::Permute& args, Address scratch, int64_t begin, int64_t end) {
        require(!args.positions || scratch, "permute: positions need scratch");
        mk::permute(args, begin, end, at<void>(scratch));
      },
      no_gil, kw, "args"_a, "scratch"_a, "begin"_a, "end"_a);

  bind_covariance(m);
  bind_zip_match(m);
  bind_zip_weights(m);
}
