#include "halfbyte/tensor_view.h"

namespace halfbyte {

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kUInt8:
      return "uint8";
    case DType::kInt64:
      return "int64";
  }
  return "unknown";
}

int64_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kUInt8:
      return 1;
    case DType::kInt64:
      return 8;
  }
  return 0;
}

static std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::string describe(const TensorView& view) {
  return view.given ? dtype_name(view.dtype) + shape_text(view.shape) : "nothing";
}

void check_dtype(const char* name, const TensorView& view, std::initializer_list<DType> dtypes) {
  std::string expected;
  bool found = false;
  for (DType dtype : dtypes) {
    expected += (expected.empty() ? "" : " or ") + std::string(dtype_name(dtype));
    found = found || (view.given && view.dtype == dtype);
  }
  HALFBYTE_CHECK(found, name, ": expected ", expected, ", got ", describe(view));
}

void check_tensor(const char* name, const TensorView& view, std::initializer_list<DType> dtypes,
                  const std::vector<int64_t>& shape) {
  check_dtype(name, view, dtypes);
  HALFBYTE_CHECK(view.shape == shape, name, ": expected shape ", shape_text(shape), ", got ",
                 describe(view));
}

static std::string place_text(const Place& place) {
  return place.is_cuda() ? concat("cuda:", place.index) : "the CPU";
}

void check_places(const char* first, const Place& place, std::initializer_list<NamedView> views) {
  for (const auto& [name, view] : views) {
    const bool same = view.place.device == place.device && view.place.index == place.index;
    HALFBYTE_CHECK(!view.given || same, name, ": expected a tensor on ", place_text(place),
                   ", where ", first, " is, got one on ", place_text(view.place));
  }
}

}  // namespace halfbyte
