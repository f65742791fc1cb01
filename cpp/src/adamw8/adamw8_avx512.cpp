// 8-bit AdamW for AVX-512 (F, BW, DQ, VL); the story is in adamw8_blocks.inc.
//
// Decoding looks a code up in registers: the map as two planes of 16-bit words, 64 entries to a
// vpermi2w, 32 codes at a time. A gather would take three times as long.
#include <immintrin.h>

#include "adamw8_impl.h"
#include "simd/prelude.h"

namespace halfbyte {
namespace {
#include "simd/avx512.inc"

#include "adamw8/adamw8_avx512.inc"

constexpr int kGroup = 32;  // elements decoded at a time

// 32 codes as words, in the order that unpacking words to pairs turns into memory order.
inline Bits load_codes(const uint8_t* codes) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(bytes, order));
}

inline Bits look_up_64(const Bits* table, Bits index) {
  return _mm512_permutex2var_epi16(table[0], index, table[1]);
}

inline Bits look_up_128(const Bits* table, Bits index, __mmask32 bit6) {
  return _mm512_mask_blend_epi16(bit6, look_up_64(table, index), look_up_64(table + 2, index));
}

// The two halves of 32 fp32 values, in memory order.
inline void join_words(Bits low, Bits high, Vec out[2]) {
  out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
  out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
}

struct UnsignedDecoder {
  Bits low[8], high[8];
};

inline UnsignedDecoder make_unsigned_decoder(const DynamicMapTables& map) {
  UnsignedDecoder decoder;
  for (int i = 0; i < 8; ++i) {
    decoder.low[i] = _mm512_load_si512(map.low_words + 32 * i);
    decoder.high[i] = _mm512_load_si512(map.high_words + 32 * i);
  }
  return decoder;
}

// out = U[codes[0 .. 31]].
inline void decode(const UnsignedDecoder& map, const uint8_t* codes, Vec out[2]) {
  const Bits code = load_codes(codes);
  const __mmask32 bit6 = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
  const __mmask32 bit7 = _mm512_test_epi16_mask(code, _mm512_set1_epi16(128));
  const Bits low = _mm512_mask_blend_epi16(bit7, look_up_128(map.low, code, bit6),
                                           look_up_128(map.low + 4, code, bit6));
  const Bits high = _mm512_mask_blend_epi16(bit7, look_up_128(map.high, code, bit6),
                                            look_up_128(map.high + 4, code, bit6));
  join_words(low, high, out);
}

struct SignedDecoder {
  Bits low[4], high[4];
};

inline SignedDecoder make_signed_decoder(const DynamicMapTables& map) {
  SignedDecoder decoder;
  for (int i = 0; i < 4; ++i) {
    decoder.low[i] = _mm512_load_si512(map.low_words + 32 * i);
    decoder.high[i] = _mm512_load_si512(map.high_words + 32 * i);
  }
  return decoder;
}

// out = S[codes[0 .. 31]]: by magnitude k = |code - 127|, 0 .. 127, where k = 128 is 1.0.
inline void decode(const SignedDecoder& map, const uint8_t* codes, Vec out[2]) {
  const Bits distance = _mm512_sub_epi16(load_codes(codes), _mm512_set1_epi16(127));
  const Bits k = _mm512_abs_epi16(distance);
  const __mmask32 bit6 = _mm512_test_epi16_mask(k, _mm512_set1_epi16(64));
  const __mmask32 one = _mm512_test_epi16_mask(k, _mm512_set1_epi16(128));
  Bits high = look_up_128(map.high, k, bit6);
  high = _mm512_mask_mov_epi16(high, one, _mm512_set1_epi16(0x3F80));
  high =
      _mm512_ternarylogic_epi32(high, distance, _mm512_set1_epi16(INT16_MIN), 0xF8);  // a | (b & c)
  join_words(look_up_128(map.low, k, bit6), high, out);
}

#include "adamw8/adamw8_blocks.inc"
}  // namespace

void adamw8_update_avx512(const AdamW8Span& span) {
  update(span);
}

bool adamw8_finite_avx512(const void* data, DType dtype, int64_t count) {
  return all_finite(data, dtype, count);
}

}  // namespace halfbyte
