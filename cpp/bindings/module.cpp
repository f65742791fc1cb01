// The Python module `_C`: thin. Arguments are tensors; every check lives in the core.
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
  module.def("cpu_features", [] {
    py::dict features;
    for (const auto& [name, present] : cpu_feature_list()) features[name.c_str()] = present;
    return features;
  });
  module.def("cuda_why_not", &cuda_why_not);
  module.def("cuda_devices", &cuda_devices);
  module.def(
      "cuda_variants",
      [](const std::string& op, int device) { return variant_rows(cuda_variants(op, device)); },
      py::arg("op"), py::arg("device"));
  module.def("forced_variant", [](const std::string& op) { return forced_variant(op.c_str()); });
  module.def("advise_huge_pages", &advise_huge_pages, py::arg("memory"));

  bind_views(module);
  bind_nf4(module);
  bind_lora_linear(module);
  bind_adamw8(module);
  bind_paged(module);
  bind_calibrate(module);
}
