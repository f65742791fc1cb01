// Quantize and dequantize for AVX512; the story is in nf4_kernels.inc and nf4_decode.inc.
#include <immintrin.h>

#include "nf4_impl.h"
#include "simd/prelude.h"

namespace halfbyte {
namespace {
#include "simd/avx512.inc"
#include "nf4/nf4_decode.inc"
#include "nf4/nf4_kernels.inc"
}  // namespace

int64_t quantize_blocks_avx512(const QuantizeArgs& args, int64_t begin, int64_t end) {
  return quantize_blocks(args, begin, end);
}

void dequantize_span_avx512(const Nf4Bits& bits, int64_t begin, int64_t count, DType dtype,
                            void* out) {
  dequantize_span(bits, begin, count, dtype, out);
}

}  // namespace halfbyte
