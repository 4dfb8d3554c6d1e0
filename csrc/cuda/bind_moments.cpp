// Functions of gram in module mergekern._cuda; bind_cuda.cpp calls bind_moments.
#include <pybind11/pybind11.h>

#include "bind_common.h"
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
}
