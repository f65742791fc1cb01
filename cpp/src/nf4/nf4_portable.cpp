// Quantize and dequantize for any processor; the story is in nf4_kernels.inc and nf4_decode.inc.

#include "nf4_impl.h"
#include "simd/prelude.h"

namespace halfbyte {
namespace {
#include "simd/portable.inc"
#include "nf4/nf4_decode.inc"
#include "nf4/nf4_kernels.inc"
}  // namespace

int64_t quantize_blocks_portable(const QuantizeArgs& args, int64_t begin, int64_t end) {
  return quantize_blocks(args, begin, end);
}

void dequantize_span_portable(const Nf4Bits& bits, int64_t begin, int64_t count, DType dtype,
                              void* out) {
  dequantize_span(bits, begin, count, dtype, out);
}

}  // namespace halfbyte
