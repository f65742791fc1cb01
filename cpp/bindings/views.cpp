// Tensors as views. The dtypes of torch are registered once, by identity.
#include "views.h"

namespace py = pybind11;

namespace halfbyte {
namespace {

constexpr size_t kDtypes = 6;

// Borrowed torch.dtype objects, which live as long as torch does.
struct Dtypes {
  PyObject* objects[kDtypes] = {};
  PyObject *data_ptr, *dtype, *shape, *is_cpu, *get_device, *is_contiguous;

  Dtypes()
      : data_ptr(PyUnicode_InternFromString("data_ptr")),
        dtype(PyUnicode_InternFromString("dtype")),
        shape(PyUnicode_InternFromString("shape")),
        is_cpu(PyUnicode_InternFromString("is_cpu")),
        get_device(PyUnicode_InternFromString("get_device")),
        is_contiguous(PyUnicode_InternFromString("is_contiguous")) {}
};

constexpr DType kOrder[kDtypes] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16,
                                   DType::kUInt8,   DType::kInt64,    DType::kFloat32};
constexpr size_t kInt32 = 5;  // read as float32 bit patterns, in statistics only

Dtypes& dtypes() {
  static Dtypes* registered = new Dtypes;  // never destroyed: Python may be gone by then
  return *registered;
}

py::object attribute(py::handle object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object call(py::handle object, PyObject* name) {
  PyObject* value = PyObject_CallMethodNoArgs(object.ptr(), name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

DType dtype_of(py::handle tensor, Statistics statistics) {
  const py::object dtype = attribute(tensor, dtypes().dtype);
  for (size_t i = 0; i < kDtypes; ++i) {
    if (dtype.ptr() != dtypes().objects[i]) continue;
    if (i == kInt32 && statistics == Statistics::kNo) break;
    return kOrder[i];
  }
  throw Error(concat("expected a tensor of float32, bfloat16, float16, uint8 or int64, got ",
                     py::str(dtype).cast<std::string>()));
}

}  // namespace

TensorView view_of(py::handle tensor, Statistics statistics) {
  if (tensor.is_none()) return {};
  const Dtypes& names = dtypes();
  const DType dtype = dtype_of(tensor, statistics);
  if (!call(tensor, names.is_contiguous).cast<bool>())
    throw Error(concat("expected a contiguous tensor, got strides ",
                       py::str(tensor.attr("stride")()).cast<std::string>()));
  const py::tuple extents = attribute(tensor, names.shape);
  std::vector<int64_t> shape(extents.size());
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = extents[i].cast<int64_t>();
  const auto address = call(tensor, names.data_ptr).cast<uintptr_t>();
  Place place;
  if (!attribute(tensor, names.is_cpu).cast<bool>())
    place = {Device::kCuda, call(tensor, names.get_device).cast<int>()};
  return TensorView(reinterpret_cast<void*>(address), dtype, std::move(shape), place);
}

QuantizedView quantized_view_of(py::handle weight) {
  const auto parts = py::reinterpret_borrow<py::sequence>(weight);
  HALFBYTE_CHECK(parts.size() == 8, "weight: expected 8 parts, got ", parts.size());
  QuantizedView view;
  view.packed = view_of(parts[0]);
  view.absmax = view_of(parts[1], Statistics::kYes);
  view.nested_absmax = view_of(parts[2], Statistics::kYes);
  view.offset = view_of(parts[3], Statistics::kYes);
  view.codebook = codebook_by_name(parts[4].cast<std::string>());
  view.levels = view_of(parts[5], Statistics::kYes);
  view.nested_map = view_of(parts[6], Statistics::kYes);
  view.block_size = parts[7].cast<int64_t>();
  return view;
}

void check_signals() {
  const py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void bind_views(py::module_& module) {
  // torch.float32, bfloat16, float16, uint8, int64, int32, in this order.
  module.def("register_dtypes", [](const py::tuple& objects) {
    HALFBYTE_CHECK(objects.size() == kDtypes, "dtypes: expected ", kDtypes, ", got ",
                   objects.size());
    for (size_t i = 0; i < objects.size(); ++i) dtypes().objects[i] = objects[i].ptr();
  });
}

}  // namespace halfbyte
