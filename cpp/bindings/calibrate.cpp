// Scale search and error feedback for Python.
#include "halfbyte/calibrate.h"

#include "views.h"

namespace py = pybind11;

namespace halfbyte {

void bind_calibrate(py::module_& module) {
  module.def(
      "search_scales",
      [](const TensorView& weight, const TensorView& moments, const std::string& codebook,
         int64_t block_size, const TensorView& scales, int threads) {
        const ReleaseGil release;
        search_scales({weight, moments, codebook_by_name(codebook), block_size, scales, threads});
      },
      py::arg("weight"), py::arg("moments"), py::arg("codebook"), py::arg("block_size"),
      py::arg("scales"), py::arg("threads"));
  module.def(
      "feedback_codes",
      [](const TensorView& weight, const TensorView& scales, const TensorView& coefficients,
         const TensorView& order, bool triangular, const std::string& codebook, int64_t block_size,
         const TensorView& errors, const TensorView& codes, int threads) {
        const ReleaseGil release;
        feedback_codes({weight, scales, coefficients, order, triangular, codebook_by_name(codebook),
                        block_size, errors, codes, threads});
      },
      py::arg("weight"), py::arg("scales"), py::arg("coefficients"), py::arg("order"),
      py::arg("triangular"), py::arg("codebook"), py::arg("block_size"), py::arg("errors"),
      py::arg("codes"), py::arg("threads"));
  module.def("search_scales_variants", [] { return variant_rows(search_scales_variants()); });
  module.def("feedback_codes_variants", [] { return variant_rows(feedback_codes_variants()); });
}

}  // namespace halfbyte
