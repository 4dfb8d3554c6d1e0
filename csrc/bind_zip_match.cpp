// zip_match for module mergekern._cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "zip_match.h"

namespace py = pybind11;
using namespace pybind11::literals;
using std::int64_t;

namespace {

void zip_match(const mk::View& correlation, const std::vector<int64_t>& offsets, int64_t width,
               double alpha, std::vector<int64_t> budgets, bool zipit, std::uintptr_t scratch,
               std::uintptr_t labels) {
  const int64_t size = correlation.shape[0];
  if (correlation.ndim != 2 || correlation.shape[1] != size || size > INT32_MAX || width < 1)
    throw std::invalid_argument("zip_match: a square matrix and a width");
  if (offsets.size() != budgets.size() + 1 || offsets.front() != 0 || offsets.back() != size ||
      !std::is_sorted(offsets.begin(), offsets.end()))
    throw std::invalid_argument("zip_match: models that fill the matrix, and a budget for each");
  mk::zip_match(
      {correlation, offsets.data(), int64_t(budgets.size()), width, alpha, budgets.data(), zipit},
      reinterpret_cast<void*>(scratch), reinterpret_cast<int64_t*>(labels));
}

}  // namespace

void bind_zip_match(py::module_& m) {
  m.def("zip_match", &zip_match, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
        "correlation"_a, "offsets"_a, "width"_a, "alpha"_a, "budgets"_a, "zipit"_a, "scratch"_a,
        "labels"_a);
  m.def("zip_match_scratch", &mk::zip_match_scratch, py::kw_only(), "correlation"_a);
}
