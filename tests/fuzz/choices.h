// Random choices of a fuzz case, and what can be wrong with a tensor or a number.
//
// Nothing here claims more memory than there is: a view that lies about its size within what could
// exist is beyond any check. Shapes shrink, turn negative, or grow past what can be counted.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>

#include "../cpp/test_support.h"

namespace halfbyte::fuzz {

constexpr DType kFloats[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

class Choices {
 public:
  explicit Choices(uint64_t seed) : random_(seed) {}

  uint64_t bits() { return random_(); }
  int64_t below(int64_t end) {
    return static_cast<int64_t>(random_() % static_cast<uint64_t>(end));
  }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <class T, size_t n>
  T of(const T (&values)[n]) {
    return values[below(n)];
  }
  DType any_float() { return of(kFloats); }
  // Small, and often at a border of the kernels: panels of 64, tiles of 6, chunks of 128.
  int64_t extent() {
    constexpr int64_t kBorders[] = {0, 1, 2, 5, 6, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129};
    return one_in(2) ? of(kBorders) : below(160);
  }
  int64_t block_size() { return int64_t{32} << below(8); }
  int64_t hostile_integer() {
    constexpr int64_t kHostile[] = {INT64_MIN, INT64_MIN + 1,    -64,      -1, 0, 1, 33,
                                    48,        int64_t{1} << 61, INT64_MAX};
    return of(kHostile);
  }
  double hostile_number() {
    constexpr double kHostile[] = {-1, 0, 1, 2, 1e30, -1e300, INFINITY, -INFINITY, NAN, 5e-324};
    return of(kHostile);
  }
  int threads() {
    constexpr int kThreads[] = {1, 1, 2, 3, 7, 0, -1, INT32_MIN, INT32_MAX};
    return of(kThreads);
  }

  void spoil(TensorView& view) {
    if (!view.given) return;
    int64_t* extent = view.shape.empty() ? nullptr : &view.shape[below(view.shape.size())];
    switch (below(6)) {
      case 0:
        view = {};
        break;
      case 1:
        view.data = nullptr;
        break;
      case 2:
        spoil_dtype(view);
        break;
      case 3:
        if (extent != nullptr) *extent = one_in(2) ? -1 - below(5) : (INT64_MAX >> below(3));
        break;
      case 4:
        if (extent != nullptr && *extent > 0) *extent -= 1 + below(*extent);
        break;
      default:
        view.shape.push_back(below(2));
    }
  }

  // Whether some tensor's bytes are read as another dtype: values of any size.
  bool reinterpreted() const { return reinterpreted_; }

 private:
  void spoil_dtype(TensorView& view) {
    constexpr DType kAll[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kUInt8,
                              DType::kInt64};
    const DType dtype = of(kAll);
    if (dtype == view.dtype || dtype_size(dtype) > dtype_size(view.dtype)) return;
    view.dtype = dtype;
    reinterpreted_ = true;
  }

  std::mt19937_64 random_;
  bool reinterpreted_ = false;
};

// The bytes that two runs of one call must agree on, and how closely.
struct Outcome {
  std::string error;  // the message of the `Error` it threw
  std::vector<std::vector<uint8_t>> bytes;
  std::vector<std::vector<double>> values;
  bool guards_hold = true;
};

// Of an output's elements, the root mean square, and at least 1: an element that cancels to less
// carries the error of its terms.
inline double usual_size(const std::vector<double>& values) {
  double squares = 0, count = 0;
  for (double value : values) {
    if (!std::isfinite(value)) continue;
    squares += value * value;
    ++count;
  }
  return std::sqrt(std::max(1.0, count > 0 ? squares / count : 0.0));
}

inline std::string compare(const Outcome& got, const Outcome& want, double tolerance) {
  if (got.error != want.error)
    return "error '" + got.error + "', the reference's '" + want.error + "'";
  if (!got.guards_hold || !want.guards_hold) return "wrote outside of its outputs";
  if (!got.error.empty()) return "";
  if (got.bytes != want.bytes) return "other bytes than the reference's";
  for (size_t i = 0; i < got.values.size(); ++i) {
    const double usual = usual_size(want.values[i]);
    for (size_t j = 0; j < got.values[i].size(); ++j) {
      const double a = got.values[i][j], b = want.values[i][j];
      const bool near = std::isfinite(a) && std::isfinite(b)
                            ? std::fabs(a - b) <= tolerance * (usual + std::fabs(b))
                            : std::isfinite(a) == std::isfinite(b);
      if (!near) return concat("output ", i, "[", j, "] is ", a, ", the reference's ", b);
    }
  }
  return "";
}

}  // namespace halfbyte::fuzz
