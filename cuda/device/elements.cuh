// Eight neighbouring elements of any type in registers, and their values in fp32.
//
// Raw8 is what memory holds: element j of a 4-byte type is word j, of a 2-byte type half j % 2 of
// word j / 2, of a byte type byte j % 4 of word j / 4. A whole, aligned group moves in 8- and
// 16-byte pieces; any other moves element by element. Loading is apart from converting, so that all
// loads of a step are under way before the first value is used.
//
// float -> bfloat16 or float16 rounds to nearest even, subnormals kept.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "halfbyte/dtype.h"

namespace halfbyte::cuda {

constexpr int kLaneElements = 8;

struct Raw8 {
  uint32_t word[8];
};

// Of a float type.
__host__ __device__ constexpr int element_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// --- memory
// ---------------------------------------------------------------------------------------

// data + index * bytes must be aligned to min(8 * bytes, 16).
static __device__ __forceinline__ Raw8 load_whole(const void* data, int bytes, int64_t index) {
  const char* at = static_cast<const char*>(data) + index * bytes;
  Raw8 raw = {};
  if (bytes == 1) {
    const uint2 low = *reinterpret_cast<const uint2*>(at);
    raw.word[0] = low.x, raw.word[1] = low.y;
    return raw;
  }
  const uint4 low = *reinterpret_cast<const uint4*>(at);
  raw.word[0] = low.x, raw.word[1] = low.y, raw.word[2] = low.z, raw.word[3] = low.w;
  if (bytes == 4) {
    const uint4 high = *reinterpret_cast<const uint4*>(at + 16);
    raw.word[4] = high.x, raw.word[5] = high.y, raw.word[6] = high.z, raw.word[7] = high.w;
  }
  return raw;
}

static __device__ __forceinline__ void store_whole(void* data, int bytes, int64_t index,
                                                   const Raw8& raw) {
  char* at = static_cast<char*>(data) + index * bytes;
  if (bytes == 1) {
    *reinterpret_cast<uint2*>(at) = make_uint2(raw.word[0], raw.word[1]);
    return;
  }
  *reinterpret_cast<uint4*>(at) = make_uint4(raw.word[0], raw.word[1], raw.word[2], raw.word[3]);
  if (bytes == 4)
    *reinterpret_cast<uint4*>(at + 16) =
        make_uint4(raw.word[4], raw.word[5], raw.word[6], raw.word[7]);
}

// The first `count` of eight; zeros follow.
static __device__ __forceinline__ Raw8 load_some(const void* data, int bytes, int64_t index,
                                                 int count) {
  Raw8 raw = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j >= count) break;
    if (bytes == 1)
      raw.word[j / 4] |= static_cast<uint32_t>(static_cast<const uint8_t*>(data)[index + j])
                         << 8 * (j % 4);
    if (bytes == 2)
      raw.word[j / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index + j])
                         << 16 * (j % 2);
    if (bytes == 4) raw.word[j] = static_cast<const uint32_t*>(data)[index + j];
  }
  return raw;
}

static __device__ __forceinline__ void store_some(void* data, int bytes, int64_t index, int count,
                                                  const Raw8& raw) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j >= count) break;
    if (bytes == 1)
      static_cast<uint8_t*>(data)[index + j] = static_cast<uint8_t>(raw.word[j / 4] >> 8 * (j % 4));
    if (bytes == 2)
      static_cast<uint16_t*>(data)[index + j] =
          static_cast<uint16_t>(raw.word[j / 2] >> 16 * (j % 2));
    if (bytes == 4) static_cast<uint32_t*>(data)[index + j] = raw.word[j];
  }
}

// --- values
// ---------------------------------------------------------------------------------------

static __device__ __forceinline__ float half_bits_to_float(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

static __device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return static_cast<uint32_t>(__bfloat16_as_ushort(pair.x)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
}

static __device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return static_cast<uint32_t>(__half_as_ushort(__low2half(pair))) |
         static_cast<uint32_t>(__half_as_ushort(__high2half(pair))) << 16;
}

// dtype: a float type, the same for the whole warp.
static __device__ __forceinline__ void to_floats(const Raw8& raw, DType dtype, float values[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t pair = raw.word[j / 2];
    if (dtype == DType::kFloat32) {
      values[j] = __uint_as_float(raw.word[j]);
    } else if (dtype == DType::kBFloat16) {
      values[j] = __uint_as_float(j % 2 ? pair & 0xFFFF0000u : pair << 16);
    } else {
      values[j] = half_bits_to_float(j % 2 ? pair >> 16 : pair);
    }
  }
}

static __device__ __forceinline__ Raw8 from_floats(const float values[8], DType dtype) {
  Raw8 raw = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (dtype == DType::kFloat32) {
      raw.word[j] = __float_as_uint(values[j]);
    } else if (j % 2) {
      raw.word[j / 2] = dtype == DType::kBFloat16 ? pack_bf16(values[j - 1], values[j])
                                                  : pack_fp16(values[j - 1], values[j]);
    }
  }
  return raw;
}

static __device__ __forceinline__ uint32_t byte_of(const Raw8& raw, int j) {
  return raw.word[j / 4] >> 8 * (j % 4) & 0xFFu;
}

}  // namespace halfbyte::cuda
