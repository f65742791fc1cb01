// What several tests share: guarded memory, forced variants, random values, error messages.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "halfbyte/check.h"
#include "halfbyte/tensor_view.h"
#include "halfbyte/variant.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace halfbyte::test {

constexpr int64_t kGuard = 256;  // bytes before and after; 0xFF: NaN in every float type

// `count` elements of `dtype` at `shift` elements off alignment, amid NaN. Under the address
// sanitizer reading the guards is an error too.
class Buffer {
 public:
  Buffer(int64_t count, DType dtype, int64_t shift = 0)
      : count_(count), dtype_(dtype), front_(kGuard + shift * dtype_size(dtype)) {
    storage_.assign(front_ + bytes() + kGuard, 0xFF);
    std::memset(data(), 0, bytes());
    ASAN_POISON_MEMORY_REGION(storage_.data(), front_);
    ASAN_POISON_MEMORY_REGION(storage_.data() + front_ + bytes(), kGuard);
  }
  ~Buffer() { ASAN_UNPOISON_MEMORY_REGION(storage_.data(), storage_.size()); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * dtype_size(dtype_); }
  uint8_t* data() { return storage_.data() + front_; }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data());
  }
  TensorView view() { return TensorView(data(), dtype_, {count_}); }
  TensorView view(std::vector<int64_t> shape) { return TensorView(data(), dtype_, shape); }
  std::vector<uint8_t> contents() { return {data(), data() + bytes()}; }
  bool guards_hold() {
    ASAN_UNPOISON_MEMORY_REGION(storage_.data(), storage_.size());
    bool hold = true;
    for (int64_t i = 0; i < front_; ++i) hold = hold && storage_[i] == 0xFF;
    for (size_t i = front_ + bytes(); i < storage_.size(); ++i) hold = hold && storage_[i] == 0xFF;
    ASAN_POISON_MEMORY_REGION(storage_.data(), front_);
    ASAN_POISON_MEMORY_REGION(storage_.data() + front_ + bytes(), kGuard);
    return hold;
  }

  // Values as fp32, through the dtype (truncating: any nearby value will do).
  void put(int64_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype_ == DType::kFloat32) {
      as<float>()[i] = value;
    } else if (dtype_ == DType::kBFloat16) {
      as<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
    } else {
      as<uint16_t>()[i] = half_of(value);
    }
  }
  double get(int64_t i) {
    if (dtype_ == DType::kFloat32) return as<float>()[i];
    const uint32_t half = as<uint16_t>()[i];
    if (dtype_ == DType::kBFloat16) {
      const uint32_t bits = half << 16;
      float value;
      std::memcpy(&value, &bits, 4);
      return value;
    }
    const int exponent = half >> 10 & 31;
    const double mantissa = half & 1023, sign = half >> 15 ? -1 : 1;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(mantissa, -24);
    return sign * std::ldexp(1024 + mantissa, exponent - 25);
  }
  void fill_normal(uint64_t seed, float scale = 1) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count_; ++i) put(i, normal(random) * scale);
  }

 private:
  static uint16_t half_of(float value) {
    if (value == 0) return 0;
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    int exponent;
    const double mantissa = std::frexp(std::fabs(static_cast<double>(value)), &exponent);
    if (exponent > 16) return sign | 0x7BFF;
    if (exponent < -13) return sign | static_cast<uint16_t>(std::ldexp(mantissa, exponent + 24));
    return static_cast<uint16_t>(sign | (exponent + 14) << 10 |
                                 (static_cast<int>(mantissa * 2048) & 1023));
  }

  int64_t count_;
  DType dtype_;
  int64_t front_;
  std::vector<uint8_t> storage_;
};

// Sets HALFBYTE_FORCE_VARIANT for its lifetime.
class Forced {
 public:
  explicit Forced(const std::string& setting) {
    setenv("HALFBYTE_FORCE_VARIANT", setting.c_str(), 1);
  }
  ~Forced() { unsetenv("HALFBYTE_FORCE_VARIANT"); }
};

inline std::vector<std::string> usable(const std::vector<VariantStatus>& rows) {
  std::vector<std::string> names;
  for (const VariantStatus& row : rows)
    if (row.why_not.empty()) names.push_back(row.name);
  return names;
}

// The message of the Error that `call` throws, or "".
template <class Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace halfbyte::test
