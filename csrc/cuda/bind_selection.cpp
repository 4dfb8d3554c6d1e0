// Functions of the selecting ops in module mergekern._cuda; bind_cuda.cpp calls
// bind_selection.
#include <pybind11/pybind11.h>

#include "bind_common.h"
#include "kth_magnitude.cuh"
#include "rank_mask.cuh"
#include "variance_mask.cuh"

namespace py = pybind11;
using namespace pybind11::literals;
using std::int64_t;

namespace {

mk::cuda::KeyTable key_table(Address base, Address xs, mk::DType dtype, int64_t n, int64_t numel,
                             bool rounded, bool variance, bool wide) {
  require(n >= 1 && numel >= 0 && numel < int64_t(1) << 41, "KeyTable: needs an input and a size");
  return {
      at<const void>(base), at<const void* const>(xs), dtype, n, numel, rounded, variance, wide};
}

mk::cuda::Brackets brackets_of(Address of, Address edges, Address counts, Address kept,
                               int64_t count, int64_t chunks, int64_t steps, int64_t room) {
  require(count >= 1 && chunks >= 1 && steps >= 1 && room >= 0 && room < kBlocks &&
              count * chunks < kBlocks,
          "Brackets: needs chunks, as many as a grid has room for");
  return {at<const int64_t>(of),
          at<const void>(edges),
          at<int>(counts),
          at<void>(kept),
          count,
          chunks,
          steps,
          room};
}

std::string sizes_of(const mk::cuda::KeyTable& args) {
  return std::to_string(args.n) + " inputs of " + std::to_string(args.numel) + " elements";
}

void magnitude_keys(const mk::cuda::KeyTable& source, int64_t vectors, Address out, int device,
                    Address stream) {
  check(mk::cuda::magnitude_keys(source, vectors, at<void>(out), device, at<CUstream_st>(stream)),
        "magnitude_keys", device, sizes_of(source));
}

void sample_keys(const mk::cuda::KeyTable& source, int64_t vectors, int64_t runs, Address out,
                 int device, Address stream) {
  require(runs >= 1 && source.numel / runs >= 2 * mk::cuda::kSampleRun,
          "sample_keys: too many runs");
  check(
      mk::cuda::sample_keys(source, vectors, runs, at<void>(out), device, at<CUstream_st>(stream)),
      "sample_keys", device, sizes_of(source));
}

void count_brackets(const mk::cuda::KeyTable& source, const mk::cuda::Brackets& brackets,
                    int device, Address stream) {
  check(mk::cuda::count_brackets(source, brackets, device, at<CUstream_st>(stream)),
        "count_brackets", device, sizes_of(source));
}

void count_bytes(const mk::cuda::Brackets& brackets, const mk::cuda::Descent& descent, int round,
                 int device, Address stream) {
  check(mk::cuda::count_bytes(brackets, descent, round, device, at<CUstream_st>(stream)),
        "count_bytes", device, std::to_string(brackets.count) + " brackets");
}

void count_ties(const mk::cuda::Brackets& brackets, const mk::cuda::Descent& descent,
                Address totals, Address wanted, Address found, Address ties, int device,
                Address stream) {
  check(
      mk::cuda::count_ties(brackets, descent, at<const int64_t>(totals), at<const int64_t>(wanted),
                           at<int64_t>(found), at<int>(ties), device, at<CUstream_st>(stream)),
      "count_ties", device, std::to_string(brackets.count) + " brackets");
}

void find_keys(const mk::cuda::KeyTable& source, const mk::cuda::Brackets& brackets, Address wanted,
               Address chunk, Address before, Address index, int device, Address stream) {
  check(mk::cuda::find_keys(source, brackets, at<const int64_t>(wanted), at<const int64_t>(chunk),
                            at<const int64_t>(before), at<int64_t>(index), device,
                            at<CUstream_st>(stream)),
        "find_keys", device, sizes_of(source));
}

void digit_histogram(const mk::cuda::KeyTable& source, int64_t prefix, int shift, int over,
                     Address counts, int device, Address stream) {
  check(mk::cuda::digit_histogram(source, prefix, shift, over, at<unsigned long long>(counts),
                                  device, at<CUstream_st>(stream)),
        "digit_histogram", device, sizes_of(source));
}

void variance_mask(const mk::cuda::KeyTable& source, uint64_t threshold, int64_t cut, Address bits,
                   Address squares, int device, Address stream) {
  const mk::cuda::VarianceMask args{source, threshold, cut, at<uint8_t>(bits), at<double>(squares)};
  check(mk::cuda::variance_mask(args, device, at<CUstream_st>(stream)), "variance_mask", device,
        sizes_of(source));
}

mk::cuda::RowBins bins_of(Address keys, bool wide, int64_t numel, int64_t length, int64_t inner,
                          Address rows, int64_t half) {
  require(numel >= 1 && length >= 1 && inner >= 1 && numel < int64_t(1) << 39,
          "RowBins: needs elements");
  return {at<const void>(keys), wide, numel, length, inner, at<const int64_t>(rows), half};
}

void count_bins(const mk::cuda::RowBins& bins, Address counts, int device, Address stream) {
  check(mk::cuda::count_bins(bins, at<int>(counts), device, at<CUstream_st>(stream)), "rank_mask",
        device, std::to_string(bins.numel) + " elements");
}

void rank_mask(const mk::cuda::RowBins& row_bins, Address ends, Address limits, uint64_t k0,
               uint64_t k1, int64_t first, Address bits, Address sums, int device, Address stream) {
  const mk::cuda::RankMask args{row_bins, at<const int>(ends), at<const int>(limits), k0, k1,
                                first,    at<uint8_t>(bits),   at<double>(sums)};
  check(mk::cuda::rank_mask(args, device, at<CUstream_st>(stream)), "rank_mask", device,
        std::to_string(row_bins.numel) + " elements");
}

}  // namespace

void bind_selection(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  const py::kw_only kw;

  py::class_<mk::cuda::KeyTable>(m, "KeyTable")
      .def(py::init(&key_table), kw, "base"_a, "xs"_a, "dtype"_a, "n"_a, "numel"_a, "rounded"_a,
           "variance"_a, "wide"_a);
  py::class_<mk::cuda::Brackets>(m, "Brackets")
      .def(py::init(&brackets_of), kw, "of"_a, "edges"_a, "counts"_a, "kept"_a, "count"_a,
           "chunks"_a, "steps"_a, "room"_a);
  py::class_<mk::cuda::Descent>(m, "Descent")
      .def(py::init([](Address state, Address histograms, bool wide) {
             return mk::cuda::Descent{at<int64_t>(state), at<unsigned long long>(histograms), wide};
           }),
           kw, "state"_a, "histograms"_a, "wide"_a);
  m.attr("KEY_TILE") = mk::cuda::kKeyTile;
  m.attr("SAMPLE_RUN") = mk::cuda::kSampleRun;
  m.attr("HISTOGRAMS") = mk::cuda::kHistograms;
  m.attr("VARIANCE_TILE") = mk::cuda::kVarianceTile;

  m.def("magnitude_keys", &magnitude_keys, no_gil, kw, "source"_a, "vectors"_a, "out"_a, "device"_a,
        "stream"_a);
  m.def("sample_keys", &sample_keys, no_gil, kw, "source"_a, "vectors"_a, "runs"_a, "out"_a,
        "device"_a, "stream"_a);
  m.def("count_brackets", &count_brackets, no_gil, kw, "source"_a, "brackets"_a, "device"_a,
        "stream"_a);
  m.def("count_bytes", &count_bytes, no_gil, kw, "brackets"_a, "descent"_a, "round"_a, "device"_a,
        "stream"_a);
  m.def("count_ties", &count_ties, no_gil, kw, "brackets"_a, "descent"_a, "totals"_a, "wanted"_a,
        "found"_a, "ties"_a, "device"_a, "stream"_a);
  m.def("find_keys", &find_keys, no_gil, kw, "source"_a, "brackets"_a, "wanted"_a, "chunk"_a,
        "before"_a, "index"_a, "device"_a, "stream"_a);
  m.def("digit_histogram", &digit_histogram, no_gil, kw, "source"_a, "prefix"_a, "shift"_a,
        "over"_a, "counts"_a, "device"_a, "stream"_a);
  py::class_<mk::cuda::RowBins>(m, "RowBins")
      .def(py::init(&bins_of), kw, "keys"_a, "wide"_a, "numel"_a, "length"_a, "inner"_a, "rows"_a,
           "half"_a);
  m.attr("RANK_TILE") = mk::cuda::kRankTile;
  m.def("count_bins", &count_bins, no_gil, kw, "bins"_a, "counts"_a, "device"_a, "stream"_a);
  m.def("rank_mask", &rank_mask, no_gil, kw, "bins"_a, "ends"_a, "limits"_a, "k0"_a, "k1"_a,
        "first"_a, "bits"_a, "sums"_a, "device"_a, "stream"_a);
  m.def("variance_mask", &variance_mask, no_gil, kw, "source"_a, "threshold"_a, "cut"_a, "bits"_a,
        "squares"_a, "device"_a, "stream"_a);
}
