// The LoRA linear for AVX512-BF16: units are bf16 pairs, vdpbf16ps, 6 x 4 vectors of 16.
// The story is in lora_linear_panels.inc and lora_linear_few_rows.inc.
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

// A 16-bit word of the nibbles holds elements 4 w .. 4 w + 3; vpermw looks one of them up a word.
constexpr int kSteps = 4;
template <int j>
inline Vec weights_at(const LevelTable& table, Bits nibbles) {
  constexpr int shift = j / 2 * 8 + (j % 2 ? 0 : 4);
  return _mm512_castsi512_ps(
      _mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, shift), table.words));
}
inline Vec dot_vec(Vec sum, Vec x, Vec weights) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(weights));
}
inline int64_t element_of(int step, int lane, int half) {
  return (2 * lane + half) * 4 + step;
}

#include "lora_linear/lora_linear_panels.inc"
#include "lora_linear/lora_linear_few_rows.inc"

constexpr PanelKernels kKernels = {kCompute,    pack_rows,           pack_columns, multiply,
                                   convert_row, permute_activations, few_rows,     dot_rows};
}  // namespace

const PanelKernels& panel_kernels_avx512bf16() {
  return kKernels;
}

}  // namespace halfbyte
