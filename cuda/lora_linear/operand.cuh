// One element of a matrix of any float type as fp32, pairs of elements as mma operands, and the
// counter-based dropout mask on the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "halfbyte/dropout_format.h"
#include "lora_linear/lora_linear_impl.h"

namespace halfbyte::cuda {

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}

template <class Element>
__device__ __forceinline__ Element from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Two elements in a register, the first in the lower half.
template <class Element>
__device__ __forceinline__ uint32_t pack_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float load_element(const Operand& matrix, int64_t index) {
  switch (matrix.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(matrix.data)[index];
    case DType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(matrix.data)[index]);
    default:
      return to_float(static_cast<const __half*>(matrix.data)[index]);
  }
}

__device__ __forceinline__ void store_element(const Operand& matrix, int64_t index, float value) {
  switch (matrix.dtype) {
    case DType::kFloat32:
      static_cast<float*>(matrix.data)[index] = value;
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(matrix.data)[index] = from_float<__nv_bfloat16>(value);
      break;
    default:
      static_cast<__half*>(matrix.data)[index] = from_float<__half>(value);
  }
}

__device__ __forceinline__ uint64_t dropout_row_key(const Dropout& dropout, int64_t row) {
  return halfbyte::dropout_row_key(static_cast<uint64_t>(*dropout.seed), row);
}

__device__ __forceinline__ bool dropout_keeps(const Dropout& dropout, uint64_t row_key,
                                              int64_t column) {
  return dropout_hash(row_key, column) >= dropout.threshold && dropout.scale != 0.0f;
}

}  // namespace halfbyte::cuda
