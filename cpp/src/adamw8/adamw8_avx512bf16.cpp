// 8-bit AdamW for AVX-512 with VBMI; the story is in adamw8_blocks.inc.
//
// Decoding looks a code up in registers: the map as four planes of bytes, 128 entries to a
// vpermi2b, 64 codes at a time: half the look-ups of adamw8_avx512.cpp, which is the same
// otherwise.
#include <immintrin.h>

#include "adamw8_impl.h"
#include "simd/prelude.h"

namespace halfbyte {
namespace {
#include "simd/avx512.inc"
#include "simd/avx512vbmi.inc"

#include "adamw8/adamw8_avx512.inc"

constexpr int kGroup = 64;  // elements decoded at a time

using UnsignedDecoder = MapPlanes;

inline UnsignedDecoder make_unsigned_decoder(const DynamicMapTables& map) {
  UnsignedDecoder decoder;
  for (int plane = 0; plane < 4; ++plane)
    for (int i = 0; i < 4; ++i)
      decoder.planes[plane][i] = _mm512_load_si512(map.bytes[plane] + 64 * i);
  return decoder;
}

// out = U[codes[0 .. 63]].
inline void decode(const UnsignedDecoder& map, const uint8_t* codes, Vec out[4]) {
  look_up_map(map, codes, out);
}

struct SignedDecoder {
  Bits planes[4][2];
};

inline SignedDecoder make_signed_decoder(const DynamicMapTables& map) {
  SignedDecoder decoder;
  for (int plane = 0; plane < 4; ++plane)
    for (int i = 0; i < 2; ++i)
      decoder.planes[plane][i] = _mm512_load_si512(map.bytes[plane] + 64 * i);
  return decoder;
}

// out = S[codes[0 .. 63]]: by magnitude k = |code - 127|, 0 .. 127, where k = 128 is 1.0.
inline void decode(const SignedDecoder& map, const uint8_t* codes, Vec out[4]) {
  const Bits zero_code = _mm512_set1_epi8(kDynamic8SignedZero);
  const Bits code = codes_in_order(codes);
  const __mmask64 negative = _mm512_cmplt_epu8_mask(code, zero_code);
  const Bits k = _mm512_abs_epi8(_mm512_sub_epi8(code, zero_code));
  const __mmask64 one = _mm512_movepi8_mask(k);
  Bits planes[4];
  for (int i = 0; i < 4; ++i) planes[i] = look_up_128(map.planes[i], k);
  planes[2] = _mm512_mask_mov_epi8(planes[2], one, _mm512_set1_epi8(INT8_MIN));
  planes[3] = _mm512_mask_mov_epi8(planes[3], one, _mm512_set1_epi8(0x3F));
  planes[3] = _mm512_mask_add_epi8(planes[3], negative, planes[3], _mm512_set1_epi8(INT8_MIN));
  join_bytes(planes, out);
}

#include "adamw8/adamw8_blocks.inc"
}  // namespace

void adamw8_update_avx512bf16(const AdamW8Span& span) {
  update(span);
}

bool adamw8_finite_avx512bf16(const void* data, DType dtype, int64_t count) {
  return all_finite(data, dtype, count);
}

}  // namespace halfbyte
