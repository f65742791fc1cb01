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

int64_t element_count(const char* name, const int64_t* extents, size_t dimensions) {
  constexpr int64_t kMost = INT64_MAX / 8;
  int64_t count = 1;
  for (size_t i = 0; i < dimensions; ++i) {
    HALFBYTE_CHECK(extents[i] >= 0 && (extents[i] == 0 || count <= kMost / extents[i]), name,
                   ": expected a shape of 0 to ", kMost, " elements, got ",
                   shape_text({extents, extents + dimensions}));
    count *= extents[i];
  }
  return count;
}

void check_dtype(const char* name, const TensorView& view, std::initializer_list<DType> dtypes) {
  std::string expected;
  bool found = false;
  for (DType dtype : dtypes) {
    expected += (expected.empty() ? "" : " or ") + std::string(dtype_name(dtype));
    found = found || (view.given && view.dtype == dtype);
  }
  HALFBYTE_CHECK(found, name, ": expected ", expected, ", got ", describe(view));
  const int64_t count = element_count(name, view.shape.data(), view.shape.size());
  HALFBYTE_CHECK(count == 0 || view.data != nullptr, name, ": expected memory for ", describe(view),
                 ", got none (was its storage released?)");
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
