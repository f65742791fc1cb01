// The LoRA linear for AVX512-BF16: units are bf16 pairs, vdpbf16ps, 6 x 4 vectors of 16.
// The story is in lora_linear_panels.inc.
#include <immintrin.h>

#include "lora_linear_impl.h"
#include "simd/prelude.h"

namespace halfbyte {
namespace {
#include "simd/avx512.inc"
#include "nf4/nf4_decode.inc"

constexpr bool kPairs = true;
constexpr int kTileRows = 6, kTileVecs = 4;

inline Vec dot(Vec sum, uint32_t unit, Vec panel) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(unit))),
                          reinterpret_cast<__m512bh>(panel));
}

// Pair (even[i], odd[i]) in 32-bit lane i, the even one low.
inline void weave(const uint16_t* even, const uint16_t* odd, uint32_t* units) {
  const Bits low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
  const Bits high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
  _mm512_storeu_si512(units, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

#include "lora_linear/lora_linear_panels.inc"
}  // namespace

const PanelKernels& panel_kernels_avx512bf16() {
  return kKernels;
}

}  // namespace halfbyte
