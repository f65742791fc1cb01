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

inline Vec sub(Vec a, Vec b) {
  return _mm512_sub_ps(a, b);
}
inline Vec vec_min(Vec a, Vec b) {
  return _mm512_min_ps(a, b);
}
inline Vec vec_max(Vec a, Vec b) {
  return _mm512_max_ps(a, b);
}
inline Vec vec_abs(Vec v) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF)));
}
inline Vec vec_sqrt(Vec v) {
  return _mm512_sqrt_ps(v);
}
inline Vec vec_floor(Vec v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
inline Vec divide_or_zero(Vec a, Vec b) {
  const __mmask16 divisible = _mm512_cmp_ps_mask(b, zero(), _CMP_NEQ_UQ);
  return _mm512_maskz_div_ps(divisible, a, b);
}
// `magnitude` (not negative) with the sign of x.
inline Vec with_sign_of(Vec magnitude, Vec x) {
  const Bits sign = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      _mm512_castps_si512(magnitude), _mm512_castps_si512(x), sign, 0x78));  // a ^ (b & c)
}
inline float largest_lane(Vec v) {
  return _mm512_reduce_max_ps(v);
}
// max(|v|, smallest), and `smallest` for NaN.
inline Vec magnitude_at_least(Vec v, Vec smallest) {
  return _mm512_range_ps(v, smallest, 0xB);  // the larger magnitude, sign cleared
}

// Gathers whether any code is in doubt. Adding 3072.5 leaves y + 0.5 in 4096ths in the low bits: 0
// or 1 there means that y lies between 0.5 4096ths below and 1.5 above the middle of two codes.
class Doubt {
 public:
  void near_half(Vec y) {
    const Bits fraction = _mm512_castps_si512(add(y, splat(3072.5f)));
    clear_ = _mm512_mask_test_epi32_mask(clear_, fraction, _mm512_set1_epi32(0xFFE));
  }
  void where_equal(Vec a, Vec b) { differ_ = _mm512_mask_cmp_ps_mask(differ_, a, b, _CMP_NEQ_UQ); }
  bool any() const { return (clear_ & differ_) != 0xFFFF; }

 private:
  __mmask16 clear_ = 0xFFFF, differ_ = 0xFFFF;
};

inline Vec zero_where_zero(Vec v, Vec test) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test, zero(), _CMP_NEQ_UQ), v);
}
inline Vec one_where_above(Vec a, Vec b) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), splat(1));
}
inline Vec look_up_values(const float* table, Vec index) {
  return _mm512_i32gather_ps(_mm512_cvttps_epi32(index), table, 4);
}
inline void store_low_bytes(uint8_t* out, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(_mm512_castps_si512(v)));
}

// Lines by exponent: 32 entries a table, in two registers.
struct LineTable {
  Vec bound[2], slope[2], offset[2], cap[2], tie;
};
struct Lines {
  Vec slope, offset, cap;
};

inline LineTable make_line_table(const DynamicMapTables& map) {
  LineTable table;
  table.tie = splat(map.tie);
  for (int half = 0; half < 2; ++half) {
    table.bound[half] = load(map.bound + 16 * half);
    table.slope[half] = load(map.slope + 16 * half);
    table.offset[half] = load(map.offset + 16 * half);
    table.cap[half] = load(map.cap + 16 * half);
  }
  return table;
}

inline Vec pick(const Vec (&table)[2], Bits index) {
  return _mm512_permutex2var_ps(table[0], index, table[1]);  // reads the low five bits
}

// x in [2^-31, 2).
inline Lines lines_at(const LineTable& table, Vec x) {
  Bits index = _mm512_srli_epi32(_mm512_castps_si512(x), 23);
  const __mmask16 above = _mm512_cmp_ps_mask(x, pick(table.bound, index), _CMP_GT_OQ);
  index = _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(1));
  return {pick(table.slope, index), pick(table.offset, index), pick(table.cap, index)};
}

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

// Whether any 32-bit (16-bit) word, sign aside, reaches `limit`; total is a multiple of 64 bytes.
inline bool any_at_least_32(const char* bytes, int64_t total, uint32_t limit) {
  Bits top = _mm512_setzero_si512();
  const Bits magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  for (int64_t at = 0; at < total; at += 64)
    top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_loadu_si512(bytes + at), magnitude));
  return _mm512_cmpge_epu32_mask(top, _mm512_set1_epi32(static_cast<int>(limit))) != 0;
}
inline bool any_at_least_16(const char* bytes, int64_t total, uint32_t limit) {
  Bits top = _mm512_setzero_si512();
  const Bits magnitude = _mm512_set1_epi16(0x7FFF);
  for (int64_t at = 0; at < total; at += 64)
    top = _mm512_max_epu16(top, _mm512_and_si512(_mm512_loadu_si512(bytes + at), magnitude));
  return _mm512_cmpge_epu16_mask(top, _mm512_set1_epi16(static_cast<short>(limit))) != 0;
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
