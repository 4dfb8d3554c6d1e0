// zip_match for module mergekern._cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "bind_common.h"
#include "zip_match.h"

namespace py = pybind11;
using namespace pybind11::literals;
using std::int64_t;

namespace {

void zip_match(const mk::View& correlation, const std::vector<int64_t>& offsets, int64_t width,
               double alpha, std::vector<int64_t> budgets, bool zipit, Address scratch,
               Address labels) {
  const int64_t size = correlation.shape[0];
  require(correlation.ndim == 2 && correlation.shape[1] == size && size <= INT32_MAX && width > 0,
          "zip_match: a square matrix and a width");
  require(offsets.size() == budgets.size() + 1 && offsets.front() == 0 && offsets.back() == size &&
              std::is_sorted(offsets.begin(), offsets.end()),
          "zip_match: models that fill the matrix, and a budget for each");
  mk::zip_match(
      {correlation, offsets.data(), int64_t(budgets.size()), width, alpha, budgets.data(), zipit},
      at<void>(scratch), at<int64_t>(labels));
}

}  // namespace

void bind_zip_match(py::module_& m) {
  m.def("zip_match", &zip_match, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
        "correlation"_a, "offsets"_a, "width"_a, "alpha"_a, "budgets"_a, "zipit"_a, "scratch"_a,
        "labels"_a);
  m.def("zip_match_scratch", &mk::zip_match_scratch, py::kw_only(), "correlation"_a);
}
