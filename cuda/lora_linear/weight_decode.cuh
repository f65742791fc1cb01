// Scales that are read ahead of their use, and runs of decoded weights at any position.
//
//   w[i] = levels[code[i]] * scale(i >> block_shift)         nf4_format.h
#pragma once

#include <stdint.h>

#include "device/nf4_decode.cuh"

namespace halfbyte::cuda {

// A scale as it lies in memory.
struct RawScale {
  uint32_t first;  // absmax, or the code of a double-quantized one
  float nested;
};

__device__ __forceinline__ RawScale fetch_scale(const Nf4Bits& bits, int64_t block) {
  if (bits.absmax) return {__float_as_uint(__ldg(bits.absmax + block)), 0.0f};
  return {__ldg(bits.absmax_codes + block), __ldg(bits.nested_absmax + (block >> 8))};
}

// Two roundings, multiply then add.
__device__ __forceinline__ float scale_value(const Nf4Bits& bits, const DecodeTables& tables,
                                             RawScale raw) {
  if (bits.absmax) return __uint_as_float(raw.first);
  return __fadd_rn(__fmul_rn(tables.map[raw.first], raw.nested), tables.offset);
}

// out[i] = w[element + i] for i < count <= 8, 0 above; any alignment, any block. Reads no byte that
// holds none of these elements.
__device__ __forceinline__ void decode_run(const Nf4Bits& bits, const DecodeTables& tables,
                                           int64_t element, int count, float (&out)[8]) {
  const int64_t block = element >> bits.block_shift;
  const int64_t until_next = ((block + 1) << bits.block_shift) - element;
  const float scale = block_scale(bits, tables, block);
  const float next_scale = until_next < count ? block_scale(bits, tables, block + 1) : scale;

  // Five bytes, the first in the highest place: ten nibbles in the order of the elements.
  const int64_t first_byte = element >> 1;
  const int odd = static_cast<int>(element & 1);
  const int bytes = (odd + count + 1) >> 1;
  uint64_t nibbles = 0;
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    const uint64_t byte = i < bytes ? __ldg(bits.packed + first_byte + i) : 0;
    nibbles |= byte << (56 - 8 * i);
  }
  nibbles <<= 4 * odd;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float level = tables.levels[nibbles >> (60 - 4 * i) & 15];
    out[i] = i < count ? __fmul_rn(level, i < until_next ? scale : next_scale) : 0.0f;
  }
}

}  // namespace halfbyte::cuda
