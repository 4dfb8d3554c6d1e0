// Functions of covariance in module mergekern._cpu; bind_cpu.cpp calls bind_covariance.
#include <pybind11/pybind11.h>

#include "bind_common.h"
#include "covariance.h"

namespace py = pybind11;
using namespace pybind11::literals;
using std::int64_t;

namespace {

mk::Rows make_rows(Address data, mk::DType dtype, Address offsets, int64_t width, int64_t stride,
                   int64_t first, int64_t side, bool zero) {
  require(first + width <= side, "Rows: more features than their side");
  return {
      at<const void>(data), dtype, at<const int64_t>(offsets), width, stride, first, side, zero};
}

// The arrays of a center, one after another.
mk::Center center_at(Address address, int64_t width) {
  double* a = at<double>(address);
  return {a, a + width, a + 2 * width, a + 3 * width, a + 4 * width, a + 5 * width, a + 6 * width};
}

bool column_means(const mk::Rows& x, Address mean, Address largest, int64_t begin, int64_t end) {
  require(begin < end, "column_means: no rows");
  return mk::column_means(x, begin, end, at<double>(mean), at<double>(largest));
}

void center(mk::DType dtype, int64_t width, int64_t n, Address chunk_mean, Address largest,
            int64_t count, Address mean, Address out) {
  mk::center(dtype, width, n, at<const double>(chunk_mean), at<const double>(largest), count,
             at<double>(mean), center_at(out, width));
}

void pack(const mk::Rows& x, int64_t first_row, int64_t last_row, Address center, Address panels,
          Address squares, int64_t begin, int64_t end) {
  mk::pack(x, first_row, last_row, center_at(center, x.side), begin, end, at<void>(panels),
           at<double>(squares));
}

mk::Pairs make_pairs(mk::DType dtype, int64_t rows, Address x, Address y, int64_t width_x,
                     int64_t width_y, Address center_x, Address center_y, Address products) {
  require(x != y || width_x == width_y, "Pairs: one side of two widths");
  return {dtype,
          rows,
          at<const void>(x),
          at<const void>(y),
          width_x,
          width_y,
          center_at(center_x, width_x),
          center_at(center_y, width_y),
          at<double>(products)};
}

}  // namespace

void bind_covariance(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  const py::kw_only kw;

  py::class_<mk::Rows>(m, "Rows").def(py::init(&make_rows), kw, "data"_a, "dtype"_a, "offsets"_a,
                                      "width"_a, "stride"_a, "first"_a, "side"_a, "zero"_a);
  py::class_<mk::Pairs>(m, "Pairs")
      .def(py::init(&make_pairs), kw, "dtype"_a, "rows"_a, "x"_a, "y"_a, "width_x"_a, "width_y"_a,
           "center_x"_a, "center_y"_a, "products"_a)
      .def_property_readonly("count", &mk::pair_count);

  m.attr("PARTIAL_ROWS") = mk::kPartialRows;
  m.attr("PANEL_BYTES") = mk::kPanelBytes;
  m.attr("CENTER_ARRAYS") = mk::kCenterArrays;

  m.def("panel_count", &mk::panel_count, "dtype"_a, "width"_a);
  m.def("column_means", &column_means, no_gil, kw, "x"_a, "mean"_a, "largest"_a, "begin"_a,
        "end"_a);
  m.def("center", &center, no_gil, kw, "dtype"_a, "width"_a, "n"_a, "chunk_mean"_a, "largest"_a,
        "count"_a, "mean"_a, "out"_a);
  m.def("pack", &pack, no_gil, kw, "x"_a, "first_row"_a, "last_row"_a, "center"_a, "panels"_a,
        "squares"_a, "begin"_a, "end"_a);
  m.def("add_products", &mk::add_products, no_gil, kw, "pairs"_a, "begin"_a, "end"_a);
}
