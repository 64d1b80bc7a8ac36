// mingle._C: the launchers for Python.  Tensors arrive as addresses, sizes and strides, so that one build serves every version of torch;
// mingle.extension checks what these functions cannot see, types and devices.
#include <pybind11/pybind11.h>

#include <array>
#include <sstream>
#include <string>

#include "launch.h"

namespace py = pybind11;
using mingle::Batch;
using mingle::Queue;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
Batch<T> batch_of(Address address, const py::tuple& strides) {
    return {pointer<T>(address), {strides[0].cast<int64_t>(), strides[1].cast<int64_t>(), strides[2].cast<int64_t>()}};
}

void cholesky_inverse(Address gram, int64_t batch, int n, double shift, bool single, Address inverse, Address flags, int device,
                      Address stream) {
    const py::gil_scoped_release release;
    const Queue queue{device, pointer<void>(stream)};
    if (single)
        mingle::launch_cholesky_inverse(queue, pointer<double>(gram), batch, n, shift, pointer<float>(inverse), pointer<int32_t>(flags));
    else
        mingle::launch_cholesky_inverse(queue, pointer<double>(gram), batch, n, shift, pointer<double>(inverse), pointer<int32_t>(flags));
}

void small_eigh(Address gram, int64_t batch, int n, Address values, Address vectors, Address flags, int device, Address stream) {
    const py::gil_scoped_release release;
    mingle::launch_small_eigh({device, pointer<void>(stream)}, pointer<double>(gram), batch, n, pointer<double>(values),
                              pointer<double>(vectors), pointer<int32_t>(flags));
}

template <class In>
void rescale_as(Address M, const py::tuple& strides, int64_t batch, int64_t m, int64_t n, Address workspace, Address scaled,
                Address exponent, Address nonfinite, Address first, const Queue& queue) {
    const auto matrices = batch_of<const In>(M, strides);
    const py::gil_scoped_release release;
    mingle::launch_rescale(queue, matrices, batch, m, n, pointer<void>(workspace), pointer<float>(scaled), pointer<int32_t>(exponent),
                           pointer<int64_t>(nonfinite), pointer<int64_t>(first));
}

void rescale(Address M, const py::tuple& strides, bool single, int64_t batch, int64_t m, int64_t n, Address workspace, Address scaled,
             Address exponent, Address nonfinite, Address first, int device, Address stream) {
    (single ? rescale_as<float> : rescale_as<double>)(M, strides, batch, m, n, workspace, scaled, exponent, nonfinite, first,
                                                      {device, pointer<void>(stream)});
}

template <class T>
void fix_signs_as(Address U, const py::tuple& u_strides, Address Vh, const py::tuple& vh_strides, int64_t batch, int64_t m, int64_t r,
                  int64_t n, const Queue& queue) {
    const auto left = batch_of<T>(U, u_strides), right = batch_of<T>(Vh, vh_strides);
    const py::gil_scoped_release release;
    mingle::launch_fix_signs(queue, left, right, batch, m, r, n);
}

void fix_signs(Address U, const py::tuple& u_strides, Address Vh, const py::tuple& vh_strides, bool single, int64_t batch, int64_t m,
               int64_t r, int64_t n, int device, Address stream) {
    (single ? fix_signs_as<float> : fix_signs_as<double>)(U, u_strides, Vh, vh_strides, batch, m, r, n, {device, pointer<void>(stream)});
}

void effective_rank(Address sigma, int64_t batch, int k, Address ranks, int device, Address stream) {
    const py::gil_scoped_release release;
    mingle::launch_effective_rank({device, pointer<void>(stream)}, pointer<double>(sigma), batch, k, pointer<int32_t>(ranks));
}

py::list split(const std::string& text) {
    py::list parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) parts.append(part);
    return parts;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    using py::arg;
    module.doc() =
        "CUDA kernels of the batched truncated SVD.\n\n"
        "Tensors are given as the addresses of contiguous device memory on `device`; `stream` is the handle of a stream there.\n"
        "Work is queued and not waited for.\n\n"
        "ValueError: a size that the kernels do not take.  RuntimeError: CUDA's own error, with its text.";
    module.attr("architectures") = split(MINGLE_ARCHITECTURES);
    module.attr("cuda_version") = MINGLE_CUDA_VERSION;

    module.def("check", &mingle::check_device, arg("device"), py::call_guard<py::gil_scoped_release>(),
               "Raise RuntimeError, with CUDA's reason, where the kernels cannot run on a device.");
    module.def("widest_eigh", &mingle::widest_eigh, arg("device"), "The widest matrix that `small_eigh` takes on a device.");
    module.def("cholesky_inverse", &cholesky_inverse, arg("gram"), arg("batch"), arg("n"), arg("shift"), arg("single"), arg("inverse"),
               arg("flags"), arg("device"), arg("stream"),
               "gram float64 [batch, n, n], n <= 128 -> inverse [batch, n, n], float32 if `single` and float64 otherwise, and\n"
               "flags int32 [batch]: G = R'R, R^-1 upper triangular; the number of shifts, or -1 where R^-1 is zero because none helped.");
    module.def(
        "small_eigh", &small_eigh, arg("gram"), arg("batch"), arg("n"), arg("values"), arg("vectors"), arg("flags"), arg("device"),
        arg("stream"),
        "gram float64 [batch, n, n], n <= `widest_eigh` -> values float64 [batch, n], falling, vectors float64 [batch, n, n], as columns, and\n"
        "flags int32 [batch]: the number of sweeps, or -1.");
    module.def("rescale_workspace", &mingle::rescale_workspace, arg("batch"), arg("m"), arg("n"),
               "Bytes of workspace that `rescale` needs.");
    module.def(
        "rescale", &rescale, arg("matrices"), arg("strides"), arg("single"), arg("batch"), arg("m"), arg("n"), arg("workspace"),
        arg("scaled"), arg("exponent"), arg("nonfinite"), arg("first"), arg("device"), arg("stream"),
        "matrices [batch, m, n] in entries of `strides` = (batch, row, 1), float32 if `single` and float64 otherwise -> scaled float32\n"
        "[batch, m, n], exponent int32 [batch], nonfinite int64 [batch], first int64 [batch] (-1 where all is finite).");
    module.def(
        "fix_signs", &fix_signs, arg("U"), arg("U_strides"), arg("Vh"), arg("Vh_strides"), arg("single"), arg("batch"), arg("m"), arg("r"),
        arg("n"), arg("device"), arg("stream"),
        "U [batch, m, r] and Vh [batch, r, n], in place, any strides (batch, row, column); float32 if `single` and float64 otherwise.");
    module.def("effective_rank", &effective_rank, arg("sigma"), arg("batch"), arg("k"), arg("ranks"), arg("device"), arg("stream"),
               "sigma float64 [batch, k] -> ranks int32 [batch].");
}
