// What the variants of quantize and dequantize share: plain arguments and entry points.
#pragma once

#include <stdint.h>

#include "halfbyte/codebook.h"
#include "halfbyte/dtype.h"
#include "halfbyte/nf4_format.h"

namespace halfbyte {

struct QuantizeArgs {
  const void* weight;  // [count]
  DType dtype;
  int64_t count;
  int64_t block_size;
  float thresholds[15];
  uint8_t code_of_rank[16];
  uint8_t zero_code;
  uint8_t* packed;  // [ceil(count / 2)]
  float* absmax;    // [blocks]
};

// Quantizes blocks [begin, end). Returns -1, or the first block that holds a non-finite value.
using QuantizeBlocks = int64_t (*)(const QuantizeArgs& args, int64_t begin, int64_t end);
// Writes elements [begin, begin + count) of the flattened weight to `out`, of type `dtype`.
using DequantizeSpan = void (*)(const Nf4Bits& bits, int64_t begin, int64_t count, DType dtype,
                                void* out);

int64_t quantize_blocks_reference(const QuantizeArgs& args, int64_t begin, int64_t end);
int64_t quantize_blocks_portable(const QuantizeArgs& args, int64_t begin, int64_t end);
int64_t quantize_blocks_avx2(const QuantizeArgs& args, int64_t begin, int64_t end);
int64_t quantize_blocks_avx512(const QuantizeArgs& args, int64_t begin, int64_t end);

void dequantize_span_reference(const Nf4Bits& bits, int64_t begin, int64_t count, DType dtype,
                               void* out);
void dequantize_span_portable(const Nf4Bits& bits, int64_t begin, int64_t count, DType dtype,
                              void* out);
void dequantize_span_avx2(const Nf4Bits& bits, int64_t begin, int64_t count, DType dtype,
                          void* out);
void dequantize_span_avx512(const Nf4Bits& bits, int64_t begin, int64_t count, DType dtype,
                            void* out);

}  // namespace halfbyte
