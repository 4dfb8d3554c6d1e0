// Module mergekern._cuda; bind_moments.cpp and bind_selection.cpp hold parts of it. Compiled by the
// host compiler; imports without a driver, and why_not() then says so.
//
// Every function takes plain addresses, sizes and enums by keyword, releases the GIL, enqueues on
// the caller's stream and does not wait.
#include <pybind11/pybind11.h>

#include "bind_common.h"
#include "merge_deltas.cuh"
#include "permute.cuh"
#include "weighted_rows.cuh"
#include "weighted_sum.cuh"
#include "zip_weights.cuh"

namespace py = pybind11;
using namespace pybind11::literals;
using std::int64_t;

void bind_moments(py::module_& m);    // bind_moments.cpp
void bind_selection(py::module_& m);  // bind_selection.cpp

namespace {

std::string why_not() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0))
    return "no CUDA device is visible; see CUDA_VISIBLE_DEVICES";
  if (error == cudaSuccess) return "";
  return std::string("no usable CUDA driver (cudaGetDeviceCount: ") + cudaGetErrorString(error) +
         "); install one that serves CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
         std::to_string(CUDART_VERSION % 1000 / 10);
}

void weighted_sum(Address out, mk::DType out_dtype, Address xs, mk::DType x_dtype, Address weights,
                  int64_t n, int64_t numel, double divisor, bool wide, int device, Address stream) {
  require(n >= 1 && numel >= 0, "weighted_sum: needs an input and a size");
  const mk::cuda::WeightedSum args{at<void>(out),
                                   out_dtype,
                                   at<const void* const>(xs),
                                   x_dtype,
                                   at<const void>(weights),
                                   n,
                                   numel,
                                   divisor,
                                   wide};
  check(mk::cuda::weighted_sum(args, device, at<CUstream_st>(stream)), "weighted_sum", device,
        std::to_string(n) + " inputs of " + std::to_string(numel) + " elements");
}

void weighted_rows(Address out, mk::DType out_dtype, Address xs, mk::DType x_dtype, Address weights,
                   int64_t n, int64_t numel, int64_t k, int64_t inner, bool wide, int device,
                   Address stream) {
  require(n >= 1 && numel >= 0 && k >= 1 && inner >= 1,
          "weighted_rows: needs an input, a size and rows");
  const mk::cuda::WeightedRows args{at<void>(out),
                                    out_dtype,
                                    at<const void* const>(xs),
                                    x_dtype,
                                    at<const void>(weights),
                                    n,
                                    numel,
                                    k,
                                    inner,
                                    wide};
  check(mk::cuda::weighted_rows(args, device, at<CUstream_st>(stream)), "weighted_rows", device,
        std::to_string(n) + " inputs of " + std::to_string(numel) + " elements");
}

mk::cuda::DeltaTable delta_table(Address base, Address rules, mk::DType dtype, int64_t n,
                                 int64_t numel, bool rounded, bool wide) {
  require(n >= 1 && numel >= 0, "merge_deltas: needs an input and a size");
  require(numel < mk::cuda::kDeltaTile << 31,
          "merge_deltas: more elements than a grid has room for");
  return {
      at<const void>(base), at<const mk::cuda::DeltaRule>(rules), dtype, n, numel, rounded, wide};
}

std::string sizes_of(const mk::cuda::DeltaTable& args) {
  return std::to_string(args.n) + " inputs of " + std::to_string(args.numel) + " elements";
}

void merge_deltas(Address out, mk::DType out_dtype, bool wide_out, Address factors, mk::Elect elect,
                  mk::Zero zero, bool max, bool alone, bool normalize, bool divide, double total,
                  double least, double instead, double scale, Address base, Address rules,
                  mk::DType dtype, int64_t n, int64_t numel, bool rounded, bool wide, int device,
                  Address stream) {
  const mk::cuda::MergeTable args{delta_table(base, rules, dtype, n, numel, rounded, wide),
                                  at<void>(out),
                                  out_dtype,
                                  wide_out,
                                  at<const void>(factors),
                                  elect,
                                  zero,
                                  max,
                                  alone,
                                  normalize,
                                  divide,
                                  total,
                                  least,
                                  instead,
                                  scale};
  check(mk::cuda::merge_deltas(args, device, at<CUstream_st>(stream)), "merge_deltas", device,
        sizes_of(args.deltas));
}

void l1_norms(Address sums, Address base, Address rules, mk::DType dtype, int64_t n, int64_t numel,
              bool rounded, bool wide, int device, Address stream) {
  const auto args = delta_table(base, rules, dtype, n, numel, rounded, wide);
  check(mk::cuda::l1_norms(args, at<double>(sums), device, at<CUstream_st>(stream)), "l1_norms",
        device, sizes_of(args));
}

void count_kept(Address counts, int64_t first, int64_t last, Address base, Address rules,
                mk::DType dtype, int64_t n, int64_t numel, bool rounded, bool wide, int device,
                Address stream) {
  const auto args = delta_table(base, rules, dtype, n, numel, rounded, wide);
  require(0 <= first && last <= numel, "count_kept: needs a range of elements");
  check(mk::cuda::count_kept(args, first, last, at<int>(counts), device, at<CUstream_st>(stream)),
        "count_kept", device, sizes_of(args));
}

void permute(Address moves, Address owners, int64_t tiles, int64_t shared, int unit,
             mk::cuda::Moving moving, int device, Address stream) {
  require(tiles >= 0 && tiles < kBlocks, "permute: needs a number of tiles");
  const mk::cuda::Permute args{
      at<const mk::cuda::Move>(moves), at<const int>(owners), tiles, shared, unit, moving};
  check(mk::cuda::permute(args, device, at<CUstream_st>(stream)), "permute", device,
        std::to_string(tiles) + " tiles of units of " + std::to_string(unit) + " bytes");
}

void zip_weights(Address zips, Address owners, int64_t tiles, int64_t shared, mk::DType dtype,
                 mk::cuda::Zipping zipping, int device, Address stream) {
  require(tiles >= 0 && tiles < kBlocks, "zip_weights: needs a number of tiles");
  const mk::cuda::ZipWeights args{
      at<const mk::cuda::Zip>(zips), at<const int>(owners), tiles, shared, dtype, zipping};
  check(mk::cuda::zip_weights(args, device, at<CUstream_st>(stream)), "zip_weights", device,
        std::to_string(tiles) + " tiles");
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  const py::kw_only kw;

  // module_local: mergekern._cpu registers the same C++ type, and both are loaded in one process.
  py::enum_<mk::DType>(m, "DType", py::module_local())
      .value("f32", mk::DType::f32)
      .value("f64", mk::DType::f64)
      .value("f16", mk::DType::f16)
      .value("bf16", mk::DType::bf16);

#ifdef MK_HOST_CUDA  // tests/kernels/host_cuda: the kernels as C++, on tensors of the host
  m.attr("emulated") = true;
#else
  m.attr("emulated") = false;
#endif
  m.def("why_not", &why_not, no_gil);
  m.def("weighted_sum", &weighted_sum, no_gil, kw, "out"_a, "out_dtype"_a, "xs"_a, "x_dtype"_a,
        "weights"_a, "n"_a, "numel"_a, "divisor"_a, "wide"_a, "device"_a, "stream"_a);
  m.def("weighted_rows", &weighted_rows, no_gil, kw, "out"_a, "out_dtype"_a, "xs"_a, "x_dtype"_a,
        "weights"_a, "n"_a, "numel"_a, "k"_a, "inner"_a, "wide"_a, "device"_a, "stream"_a);

  py::enum_<mk::Elect>(m, "Elect", py::module_local())
      .value("everyone", mk::Elect::everyone)
      .value("present", mk::Elect::present)
      .value("sum", mk::Elect::sum)
      .value("count", mk::Elect::count);
  py::enum_<mk::Zero>(m, "Zero", py::module_local())
      .value("positive", mk::Zero::positive)
      .value("negative", mk::Zero::negative)
      .value("none", mk::Zero::none);
  m.attr("DELTA_TILE") = mk::cuda::kDeltaTile;
  m.def("merge_deltas", &merge_deltas, no_gil, kw, "out"_a, "out_dtype"_a, "wide_out"_a,
        "factors"_a, "elect"_a, "zero"_a, "max"_a, "alone"_a, "normalize"_a, "divide"_a, "total"_a,
        "least"_a, "instead"_a, "scale"_a, "base"_a, "rules"_a, "dtype"_a, "n"_a, "numel"_a,
        "rounded"_a, "wide"_a, "device"_a, "stream"_a);
  m.def("l1_norms", &l1_norms, no_gil, kw, "sums"_a, "base"_a, "rules"_a, "dtype"_a, "n"_a,
        "numel"_a, "rounded"_a, "wide"_a, "device"_a, "stream"_a);
  m.def("count_kept", &count_kept, no_gil, kw, "counts"_a, "first"_a, "last"_a, "base"_a, "rules"_a,
        "dtype"_a, "n"_a, "numel"_a, "rounded"_a, "wide"_a, "device"_a, "stream"_a);

  py::enum_<mk::cuda::Moving>(m, "Moving")
      .value("rows", mk::cuda::Moving::rows)
      .value("gather", mk::cuda::Moving::gather)
      .value("staged", mk::cuda::Moving::staged);
  m.attr("MOVE_TILE") = mk::cuda::kMoveTile;
  m.attr("MOVE_PADDING") = mk::cuda::kMovePadding;
  m.def("permute", &permute, no_gil, kw, "moves"_a, "owners"_a, "tiles"_a, "shared"_a, "unit"_a,
        "moving"_a, "device"_a, "stream"_a);

  py::enum_<mk::cuda::Zipping>(m, "Zipping")
      .value("packs", mk::cuda::Zipping::packs)
      .value("stay", mk::cuda::Zipping::stay)
      .value("gather", mk::cuda::Zipping::gather)
      .value("staged", mk::cuda::Zipping::staged);
  m.attr("ZIP_TILE") = mk::cuda::kZipTile;
  m.def("zip_weights", &zip_weights, no_gil, kw, "zips"_a, "owners"_a, "tiles"_a, "shared"_a,
        "dtype"_a, "zipping"_a, "device"_a, "stream"_a);

  bind_moments(m);
  bind_selection(m);
}
