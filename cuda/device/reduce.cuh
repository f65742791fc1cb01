// Reductions inside a warp. No barrier of the block is involved.
#pragma once

#include <stdint.h>

namespace halfbyte::cuda {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// The largest of 32 values >= 0, none a NaN: as unsigned integers their bits are in the same order.
static __device__ __forceinline__ float warp_max_magnitude(float value) {
  return __uint_as_float(__reduce_max_sync(kFullWarp, __float_as_uint(value)));
}

// The same among each `lanes` neighbours, a power of two.
static __device__ __forceinline__ float group_max(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
  return value;
}

static __device__ __forceinline__ unsigned long long warp_min(unsigned long long value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const unsigned long long other = __shfl_xor_sync(kFullWarp, value, offset);
    value = other < value ? other : value;
  }
  return value;
}

}  // namespace halfbyte::cuda
