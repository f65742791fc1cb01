// A borrowed, contiguous, row-major tensor: address, dtype, shape, device. Owns nothing.
//
// Bindings, C++ tests and benchmarks all hand tensors to the core this way; the checks on them live
// once, beside each op. A default-constructed view means "not given".
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "halfbyte/check.h"
#include "halfbyte/dtype.h"

namespace halfbyte {

enum class Device { kCpu, kCuda };

// Where a tensor lies: the CPU, or CUDA device `index`.
struct Place {
  Device device = Device::kCpu;
  int index = 0;
  bool is_cuda() const { return device == Device::kCuda; }
};

const char* dtype_name(DType dtype);
int64_t dtype_size(DType dtype);

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  Place place;
  bool given = false;

  TensorView() = default;
  TensorView(const void* address, DType element, std::vector<int64_t> dims, Place where = {})
      : data(const_cast<void*>(address)),
        dtype(element),
        shape(std::move(dims)),
        place(where),
        given(true) {}

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t extent : shape) count *= extent;
    return count;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

std::string describe(const TensorView& view);  // "float32[3, 5]"

// The product of the extents. Throws when one is negative, or when elements of 8 bytes would not
// fit 63 bits.
int64_t element_count(const char* name, const int64_t* extents, size_t dimensions);

// Throws unless `view` is given, has one of `dtypes`, a countable shape and memory.
void check_dtype(const char* name, const TensorView& view, std::initializer_list<DType> dtypes);
// The same, and exactly the shape `shape`.
void check_tensor(const char* name, const TensorView& view, std::initializer_list<DType> dtypes,
                  const std::vector<int64_t>& shape);
// Throws when one that is given lies elsewhere than `place`, where the tensor called `first` is.
struct NamedView {
  const char* name;
  const TensorView& view;
};
void check_places(const char* first, const Place& place, std::initializer_list<NamedView> views);

}  // namespace halfbyte
