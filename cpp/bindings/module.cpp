// The Python module `_C`: thin. Arguments are views; every check lives in the core.
#include "views.h"

#include "halfbyte/device.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  using namespace halfbyte;
  module.attr("__version__") = HALFBYTE_VERSION;
  py::register_exception<Error>(module, "Error", PyExc_ValueError);

  py::enum_<DType>(module, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16)
      .value("uint8", DType::kUInt8)
      .value("int64", DType::kInt64);
  py::enum_<Device>(module, "Device").value("cpu", Device::kCpu).value("cuda", Device::kCuda);
  py::class_<TensorView>(module, "TensorView")
      .def(py::init<>())
      .def(py::init([](uintptr_t address, DType dtype, std::vector<int64_t> shape, Device device) {
             return TensorView(reinterpret_cast<void*>(address), dtype, std::move(shape), device);
           }),
           py::arg("address"), py::arg("dtype"), py::arg("shape"), py::arg("device") = Device::kCpu)
      .def("__repr__", [](const TensorView& view) { return describe(view); });

  module.def("cpu_features", [] {
    py::dict features;
    for (const auto& [name, present] : cpu_feature_list()) features[name.c_str()] = present;
    return features;
  });
  module.def("cuda_why_not", &cuda_why_not);

  bind_nf4(module);
  bind_lora_linear(module);
  bind_adamw8(module);
}
