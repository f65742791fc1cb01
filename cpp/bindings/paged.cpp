// Pageable optimizer state on CUDA for Python: an arena is a writable buffer that keeps itself
// alive through the tensors made over it.
#include "views.h"

#include "halfbyte/paged.h"

namespace py = pybind11;

namespace halfbyte {

void bind_paged(py::module_& module) {
  py::class_<Arena>(module, "Arena", py::buffer_protocol())
      .def(py::init<int64_t, int, const std::string&>(), py::arg("bytes"), py::arg("device"),
           py::arg("kind") = "auto")
      .def_property_readonly("bytes", &Arena::bytes)
      .def_property_readonly("device", &Arena::device)
      .def_property_readonly("kind", &Arena::kind)
      .def_property_readonly(
          "address", [](const Arena& arena) { return reinterpret_cast<uintptr_t>(arena.data()); })
      .def_buffer([](Arena& arena) {
        return py::buffer_info(static_cast<uint8_t*>(arena.data()), arena.bytes());
      });

  // pages: (arena or None, begin, end, first row, rows). The rest as in adamw8_step.
  using PageTuple = std::tuple<const Arena*, int64_t, int64_t, int64_t, int64_t>;
  module.def(
      "adamw8_paged_step",
      [](const py::buffer& table, const std::vector<AdamW8GroupTuple>& groups,
         const std::vector<PageTuple>& pages, int64_t look_ahead, bool evict, int device,
         uintptr_t stream, const TensorView& bad) {
        PagedAdamW8Params params;
        params.step = adamw8_params(table, groups, 1, device, stream, bad);
        for (const auto& [arena, begin, end, first, count] : pages)
          params.pages.push_back({arena, begin, end, first, count});
        params.look_ahead = look_ahead;
        params.evict = evict;
        py::gil_scoped_release release;
        adamw8_paged_step(params);
      },
      py::arg("table"), py::arg("groups"), py::arg("pages"), py::arg("look_ahead"),
      py::arg("evict"), py::arg("device"), py::arg("stream"), py::arg("bad"));
}

}  // namespace halfbyte
