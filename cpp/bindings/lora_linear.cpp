// The LoRA linear for Python. A call and the question how much workspace it needs (CUDA) take the
// same arguments. Ctrl-C ends it.
#include "views.h"

#include "halfbyte/lora_linear.h"

namespace py = pybind11;

namespace halfbyte {
namespace {

template <class Result, Result (*run)(const LoraLinearParams&)>
void bind_forward(py::module_& module, const char* name) {
  module.def(
      name,
      [](const TensorView& x, const QuantizedView& weight, int64_t out_features,
         const TensorView& bias, const TensorView& lora_a, const TensorView& lora_b, double scaling,
         double dropout, const TensorView& seed, const TensorView& y, const TensorView& t,
         int threads, uintptr_t stream, const TensorView& workspace) {
        const ReleaseGil release;
        return run({x, weight, out_features, bias, lora_a, lora_b, scaling, dropout, seed, y, t,
                    threads, stream_of(stream), workspace});
      },
      py::arg("x"), py::arg("weight"), py::arg("out_features"), py::arg("bias"), py::arg("lora_a"),
      py::arg("lora_b"), py::arg("scaling"), py::arg("dropout"), py::arg("seed"), py::arg("y"),
      py::arg("t"), py::arg("threads"), py::arg("stream") = 0, py::arg("workspace") = py::none());
}

template <class Result, Result (*run)(const LoraLinearBackwardParams&)>
void bind_backward(py::module_& module, const char* name) {
  module.def(
      name,
      [](const TensorView& dy, const TensorView& x, const QuantizedView& weight,
         int64_t in_features, const TensorView& lora_a, const TensorView& lora_b,
         const TensorView& t, double scaling, double dropout, const TensorView& seed,
         const TensorView& dx, const TensorView& d_lora_a, const TensorView& d_lora_b,
         const TensorView& d_bias, int threads, uintptr_t stream, const TensorView& workspace) {
        const ReleaseGil release;
        return run({dy, x, weight, in_features, lora_a, lora_b, t, scaling, dropout, seed, dx,
                    d_lora_a, d_lora_b, d_bias, threads, stream_of(stream), workspace});
      },
      py::arg("dy"), py::arg("x"), py::arg("weight"), py::arg("in_features"), py::arg("lora_a"),
      py::arg("lora_b"), py::arg("t"), py::arg("scaling"), py::arg("dropout"), py::arg("seed"),
      py::arg("dx"), py::arg("d_lora_a"), py::arg("d_lora_b"), py::arg("d_bias"),
      py::arg("threads"), py::arg("stream") = 0, py::arg("workspace") = py::none());
}

}  // namespace

void bind_lora_linear(py::module_& module) {
  bind_forward<void, lora_linear_forward>(module, "lora_linear_forward");
  bind_forward<int64_t, lora_linear_forward_workspace>(module, "lora_linear_forward_workspace");
  bind_backward<void, lora_linear_backward>(module, "lora_linear_backward");
  bind_backward<int64_t, lora_linear_backward_workspace>(module, "lora_linear_backward_workspace");
  module.def("peak_gflops", &peak_gflops, py::arg("dtype"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>());
  module.def("lora_linear_variants",
             [](DType dtype) { return variant_rows(lora_linear_variants(dtype)); });
}

}  // namespace halfbyte
