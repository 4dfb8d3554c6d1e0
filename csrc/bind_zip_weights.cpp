// zip_weights of module mergekern._cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bind_common.h"
#include "zip_weights.h"

namespace py = pybind11;
using namespace pybind11::literals;
using std::int64_t;

namespace {

mk::ZipInput make_input(Address data, int64_t width, int64_t row_stride, Address starts,
                        Address members, Address targets, Address positions, double factor) {
  require((starts == 0) == (members == 0), "ZipInput: starts and members come together");
  require(targets == 0 || positions == 0, "ZipInput: targets or positions");
  return {at<const void>(data),
          width,
          row_stride,
          at<const int64_t>(starts),
          at<const int64_t>(members),
          at<const int64_t>(targets),
          at<const std::int32_t>(positions),
          factor};
}

void zip_weights(const mk::View& out, int64_t width, const std::vector<mk::ZipInput>& xs,
                 Address row_divisors, Address column_divisors, Address scratch, int64_t begin,
                 int64_t end) {
  require(!xs.empty(), "zip_weights: no inputs");
  require((row_divisors == 0) != (column_divisors == 0),
          "zip_weights: divisors of rows or of columns");
  for (const mk::ZipInput& x : xs)
    require((x.targets == nullptr) == (xs[0].targets == nullptr) &&
                (!x.positions || x.width == width) && ((!x.targets && !x.positions) || scratch),
            "zip_weights: targets for all inputs or for none, positions for as many columns as the "
            "result has, and scratch for both");
  mk::zip_weights({out, width, xs.data(), int64_t(xs.size()), at<const double>(row_divisors),
                   at<const double>(column_divisors)},
                  begin, end, at<void>(scratch));
}

int64_t group_members(Address labels, int64_t n, int64_t groups, Address starts, Address members) {
  return mk::group_members(at<const int64_t>(labels), n, groups, at<int64_t>(starts),
                           at<int64_t>(members));
}

}  // namespace

void bind_zip_weights(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  const py::kw_only kw;
  py::class_<mk::ZipInput>(m, "ZipInput")
      .def(py::init(&make_input), kw, "data"_a, "width"_a, "row_stride"_a, "starts"_a, "members"_a,
           "targets"_a, "positions"_a, "factor"_a);
  m.attr("ZIP_ROWS") = mk::kZipRows;
  m.attr("ZIP_PIECES") = mk::kZipPieces;
  m.def("zip_weights", &zip_weights, no_gil, kw, "out"_a, "width"_a, "xs"_a, "row_divisors"_a,
        "column_divisors"_a, "scratch"_a, "begin"_a, "end"_a);
  m.def("group_members", &group_members, no_gil, kw, "labels"_a, "n"_a, "groups"_a, "starts"_a,
        "members"_a);
}
