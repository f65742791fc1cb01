// A packed 4-bit weight on the device: its tables in shared memory, its scales, its values.
//
//   w[i] = levels[code[i]] * scale(i >> block_shift)                          (nf4_format.h)
//   scale(b) = absmax[b]  or  map[absmax_codes[b]] * nested_absmax[b >> 8] + offset
//
// Multiply and add are rounded one after the other, never fused, so that every bit is the CPU's.
// Sixteen levels lie in sixteen banks of shared memory: 32 lanes look theirs up without a conflict.
#pragma once

#include <stdint.h>

#include "device/dynamic8.cuh"
#include "halfbyte/codebook.h"
#include "halfbyte/cuda/api.h"

namespace halfbyte::cuda {

struct StandardLevels {
  uint32_t bits[3][16];
};
constexpr StandardLevels make_standard_levels() {
  StandardLevels levels{};
  for (int book = 0; book < 3; ++book)
    for (int i = 0; i < 16; ++i) levels.bits[book][i] = kCodebooks[book].levels[i];
  return levels;
}
static __device__ const StandardLevels kStandardLevels = make_standard_levels();

// A block's copy of a weight's tables.
struct DecodeTables {
  float levels[16];
  float map[256];  // of double-quantized scales
  float offset;    // the same; 0 without them
};

// By all kThreads threads of the block; a barrier follows. A checkpoint's own tables are used as
// stored. The offset is set in any case: it may be read before it is known whether it counts.
template <int kThreads>
__device__ __forceinline__ void load_decode_tables(const Weight& weight, DecodeTables& tables) {
  static_assert(kThreads >= 16 && 256 % kThreads == 0, "");
  const Nf4Bits& bits = weight.bits;
  const uint32_t* standard = kStandardLevels.bits[static_cast<int>(weight.codebook)];
  const int thread = threadIdx.x;
  if (thread < 16)
    tables.levels[thread] = bits.levels ? bits.levels[thread] : __uint_as_float(standard[thread]);
  if (thread == 0) tables.offset = bits.absmax ? 0.0f : *bits.offset;
  if (bits.absmax) return;
#pragma unroll
  for (int part = 0; part < 256 / kThreads; ++part) {
    const int i = part * kThreads + thread;
    tables.map[i] = bits.nested_map ? bits.nested_map[i] : __uint_as_float(kSignedMap.bits[i]);
  }
}

static __device__ __forceinline__ float block_scale(const Nf4Bits& bits, const DecodeTables& tables,
                                                    int64_t block) {
  if (bits.absmax) return bits.absmax[block];
  const float scaled =
      __fmul_rn(tables.map[bits.absmax_codes[block]], bits.nested_absmax[block >> 8]);
  return __fadd_rn(scaled, tables.offset);
}

// Elements 0 .. n - 1 of packed bytes, the lowest byte first in memory: the even ones are the high
// nibbles.
template <int n>
__device__ __forceinline__ void decode_codes(uint32_t packed, const float (&levels)[16],
                                             float scale, float (&values)[n]) {
  static_assert(n <= 8, "eight codes to a word");
#pragma unroll
  for (int i = 0; i < n; ++i)
    values[i] = __fmul_rn(levels[packed >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15u], scale);
}

}  // namespace halfbyte::cuda
