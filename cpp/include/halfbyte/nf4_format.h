// How a 4-bit weight lies in memory, for kernels: plain C, shared by every backend.
//
//   byte[i] = code[2i] << 4 | code[2i+1]          the first element in the HIGH nibble, over the
//                                                 row-major flattened tensor of `count` elements
//   w[i]    = levels[code[i]] * scale(i / block)  blocks run over the flattened tensor and straddle
//                                                 rows; a short last block has its own scale
//   scale(b) = absmax[b], or, double-quantized,
//              nested_map[absmax_codes[b]] * nested_absmax[b / 256] + *offset
//                                                 two roundings (multiply, then add), never fused
//
// Sizes are 64-bit throughout.
#pragma once

#include <stdint.h>

namespace halfbyte {

struct Nf4Bits {
  const uint8_t* packed;        // [ceil(count / 2)]
  const float* absmax;          // [ceil(count / block)] or null when double-quantized
  const uint8_t* absmax_codes;  // [ceil(count / block)] or null
  const float* nested_absmax;   // [ceil(blocks / 256)] or null
  const float* nested_map;      // [256] or null
  const float* offset;          // [1] or null
  const float* levels;          // [16]
  int64_t count;
  int block_shift;  // log2(block size), 5 .. 12
};

static inline float nf4_block_scale(const Nf4Bits& bits, int64_t block) {
  if (bits.absmax) return bits.absmax[block];
  const float scaled = bits.nested_map[bits.absmax_codes[block]] * bits.nested_absmax[block >> 8];
  return scaled + *bits.offset;
}

static inline int nf4_code(const Nf4Bits& bits, int64_t index) {
  const int byte = bits.packed[index >> 1];
  return (index & 1) ? byte & 15 : byte >> 4;
}

}  // namespace halfbyte
