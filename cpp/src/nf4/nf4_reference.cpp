// The reference of quantize and dequantize: one element at a time, one thread, no tricks. It never
// gets faster; every other variant is held to its bits.
#include <math.h>

#include "nf4_impl.h"
#include "support/scalar.h"

namespace halfbyte {

int64_t quantize_blocks_reference(const QuantizeArgs& args, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * args.block_size;
    const int64_t last =
        first + args.block_size < args.count ? first + args.block_size : args.count;

    float absmax = 0;
    for (int64_t i = first; i < last; ++i) {
      const float magnitude = fabsf(load_element(args.weight, args.dtype, i));
      if (!(magnitude <= 3.402823466e38f)) return block;  // infinite or NaN
      absmax = magnitude > absmax ? magnitude : absmax;
    }
    args.absmax[block] = absmax;

    float lift = 1;  // brings a subnormal absmax to where its reciprocal is finite; exact
    float inverse = absmax > 0 ? 1.0f / absmax : 0.0f;
    if (isinf(inverse)) {
      lift = 1.2676506002282294e30f;  // 2^100
      inverse = 1.0f / (absmax * lift);
    }
    for (int64_t i = first; i < last; i += 2) {
      uint8_t codes[2];
      for (int half = 0; half < 2; ++half) {
        codes[half] = args.zero_code;
        if (i + half >= last) continue;
        const float x = load_element(args.weight, args.dtype, i + half) * lift * inverse;
        int rank = 0;
        for (int t = 0; t < 15; ++t) rank += x > args.thresholds[t];
        codes[half] = args.code_of_rank[rank];
      }
      args.packed[i / 2] = static_cast<uint8_t>(codes[0] << 4 | codes[1]);
    }
  }
  return -1;
}

void dequantize_span_reference(const Nf4Bits& bits, int64_t begin, int64_t count, DType dtype,
                               void* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = begin + i;
    const float scale = nf4_block_scale(bits, index >> bits.block_shift);
    store_element(out, dtype, i, bits.levels[nf4_code(bits, index)] * scale);
  }
}

}  // namespace halfbyte
