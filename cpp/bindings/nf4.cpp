// Quantize, double quantize and dequantize for Python. Ctrl-C ends them.
#include "views.h"

#include "halfbyte/dynamic8_format.h"
#include "halfbyte/nf4.h"

namespace py = pybind11;

namespace halfbyte {

void bind_nf4(py::module_& module) {
  module.def(
      "quantize_4bit",
      [](const TensorView& weight, const std::string& codebook, int64_t block_size,
         const TensorView& packed, const TensorView& absmax, int threads, uintptr_t stream) {
        const ReleaseGil release;
        quantize_4bit({weight, codebook_by_name(codebook), block_size, packed, absmax, threads,
                       stream_of(stream)});
      },
      py::arg("weight"), py::arg("codebook"), py::arg("block_size"), py::arg("packed"),
      py::arg("absmax"), py::arg("threads"), py::arg("stream") = 0);
  module.def(
      "double_quantize",
      [](const TensorView& absmax, const TensorView& offset, const TensorView& codes,
         const TensorView& nested_absmax, int threads, uintptr_t stream) {
        const ReleaseGil release;
        double_quantize({absmax, offset, codes, nested_absmax, threads, stream_of(stream)});
      },
      py::arg("absmax"), py::arg("offset"), py::arg("codes"), py::arg("nested_absmax"),
      py::arg("threads"), py::arg("stream") = 0);
  module.def(
      "dequantize_4bit",
      [](const QuantizedView& weight, const TensorView& out, int threads, uintptr_t stream) {
        const ReleaseGil release;
        dequantize_4bit({weight, out, threads, stream_of(stream)});
      },
      py::arg("weight"), py::arg("out"), py::arg("threads"), py::arg("stream") = 0);
  module.def("codebook_levels",
             [](const std::string& name) { return codebook_levels(codebook_by_name(name)); });
  module.def("signed_dynamic_map", [] {
    std::vector<float> values(256);
    dynamic8_values(DynamicMap::kSigned, values.data());
    return values;
  });
  module.def("quantize_variants", [] { return variant_rows(quantize_variants()); });
  module.def("dequantize_variants", [] { return variant_rows(dequantize_variants()); });
}

}  // namespace halfbyte
