// Scalars: a quotient rounded up; bfloat16 and float16 as fp32, one element at a time, round to
// nearest even. Internal linkage: safe to include in files of any instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "halfbyte/dtype.h"

namespace halfbyte {

static inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

static inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline float bf16_to_float(uint16_t half) {
  return float_of_bits(static_cast<uint32_t>(half) << 16);
}

static inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

static inline float fp16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7FFF;
  if (magnitude >= 0x7C00) return float_of_bits(sign | 0x7F800000u | (magnitude & 0x3FF) << 13);
  if (magnitude >= 0x0400) return float_of_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  return float_of_bits(sign | bits_of_float(subnormal));
}

static inline uint16_t float_to_fp16(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u)
    return sign | 0x7E00 | static_cast<uint16_t>(magnitude >> 13 & 0x3FF);
  if (magnitude >= 0x477FF000u) return sign | 0x7C00;  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 aligns the last bit to 2^-24
    const float aligned = float_of_bits(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bits_of_float(aligned) - 0x3F000000u);
  }
  return sign |
         static_cast<uint16_t>((magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1)) >> 13);
}

static inline float load_element(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t half = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::kBFloat16 ? bf16_to_float(half) : fp16_to_float(half);
}

static inline void store_element(void* data, DType dtype, int64_t index, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] =
        dtype == DType::kBFloat16 ? float_to_bf16(value) : float_to_fp16(value);
  }
}

// `value` as a value of `dtype`, held in fp32.
static inline float round_to(DType dtype, float value) {
  if (dtype == DType::kBFloat16) return bf16_to_float(float_to_bf16(value));
  if (dtype == DType::kFloat16) return fp16_to_float(float_to_fp16(value));
  return value;
}

}  // namespace halfbyte
