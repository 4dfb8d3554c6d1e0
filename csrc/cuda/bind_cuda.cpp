// Module mergekern._cuda: the only file of it that includes pybind11. Compiled by the host
// compiler; imports without a driver, and why_not() then says so.
//
// Every function takes plain addresses, sizes and enums by keyword, releases the GIL, enqueues on
// the caller's stream and does not wait.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "permute.cuh"
#include "weighted_rows.cuh"
#include "weighted_sum.cuh"
#include "zip_weights.cuh"

namespace py = pybind11;
using namespace pybind11::literals;
using std::int64_t;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

// The one error of a launch: op, device and sizes, and what CUDA says.
void check(cudaError_t error, const char* op, int device, const std::string& sizes) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": CUDA failed on device " + std::to_string(device) +
                           " with " + sizes + "; got " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

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

void permute(Address moves, Address owners, int64_t tiles, int64_t shared, int unit,
             mk::cuda::Moving moving, int device, Address stream) {
  require(tiles >= 0 && tiles < (int64_t(1) << 31), "permute: needs a number of tiles");
  const mk::cuda::Permute args{
      at<const mk::cuda::Move>(moves), at<const int>(owners), tiles, shared, unit, moving};
  check(mk::cuda::permute(args, device, at<CUstream_st>(stream)), "permute", device,
        std::to_string(tiles) + " tiles of units of " + std::to_string(unit) + " bytes");
}

void zip_weights(Address zips, Address owners, int64_t tiles, int64_t shared, mk::DType dtype,
                 mk::cuda::Zipping zipping, int device, Address stream) {
  require(tiles >= 0 && tiles < (int64_t(1) << 31), "zip_weights: needs a number of tiles");
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
}
