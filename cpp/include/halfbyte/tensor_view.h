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

const char* dtype_name(DType dtype);
int64_t dtype_size(DType dtype);

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  Device device = Device::kCpu;
  bool given = false;

  TensorView() = default;
  TensorView(const void* address, DType element, std::vector<int64_t> dims,
             Device where = Device::kCpu)
      : data(const_cast<void*>(address)),
        dtype(element),
        shape(std::move(dims)),
        device(where),
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

// Throws unless `view` is given, lies on the CPU and has one of `dtypes`.
void check_dtype(const char* name, const TensorView& view, std::initializer_list<DType> dtypes);
// The same, and exactly the shape `shape`.
void check_tensor(const char* name, const TensorView& view, std::initializer_list<DType> dtypes,
                  const std::vector<int64_t>& shape);

}  // namespace halfbyte
