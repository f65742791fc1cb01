// 8-bit AdamW for AVX2 + FMA; the story is in adamw8_blocks.inc.
#include <immintrin.h>

#include "adamw8_impl.h"
#include "simd/prelude.h"

namespace halfbyte {
namespace {
#include "simd/avx2.inc"

constexpr int kGroup = 32;  // elements decoded at a time

inline Vec sub(Vec a, Vec b) {
  return _mm256_sub_ps(a, b);
}
inline Vec vec_min(Vec a, Vec b) {
  return _mm256_min_ps(a, b);
}
inline Vec vec_max(Vec a, Vec b) {
  return _mm256_max_ps(a, b);
}
inline Vec vec_abs(Vec v) {
  return _mm256_andnot_ps(splat(-0.0f), v);
}
inline Vec vec_sqrt(Vec v) {
  return _mm256_sqrt_ps(v);
}
inline Vec vec_floor(Vec v) {
  return _mm256_floor_ps(v);
}
inline Vec divide_or_zero(Vec a, Vec b) {
  return _mm256_and_ps(_mm256_cmp_ps(b, zero(), _CMP_NEQ_UQ), _mm256_div_ps(a, b));
}
// `magnitude` (not negative) with the sign of x.
inline Vec with_sign_of(Vec magnitude, Vec x) {
  return _mm256_xor_ps(magnitude, _mm256_and_ps(x, splat(-0.0f)));
}
inline float largest_lane(Vec v) {
  __m128 top = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  return _mm_cvtss_f32(_mm_max_ss(top, _mm_shuffle_ps(top, top, 1)));
}
// max(|v|, smallest), and `smallest` for NaN.
inline Vec magnitude_at_least(Vec v, Vec smallest) {
  return vec_max(vec_abs(v), smallest);
}

// Gathers whether any code is in doubt. Adding 3072.5 leaves y + 0.5 in 4096ths in the low bits: 0
// or 1 there means that y lies between 0.5 4096ths below and 1.5 above the middle of two codes.
class Doubt {
 public:
  void near_half(Vec y) {
    const Bits fraction =
        _mm256_and_si256(_mm256_castps_si256(add(y, splat(3072.5f))), _mm256_set1_epi32(0xFFE));
    any_ = _mm256_or_si256(any_, _mm256_cmpeq_epi32(fraction, _mm256_setzero_si256()));
  }
  void where_equal(Vec a, Vec b) {
    any_ = _mm256_or_si256(any_, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
  }
  bool any() const { return !_mm256_testz_si256(any_, any_); }

 private:
  Bits any_ = _mm256_setzero_si256();
};

inline Vec zero_where_zero(Vec v, Vec test) {
  return _mm256_and_ps(_mm256_cmp_ps(test, zero(), _CMP_NEQ_UQ), v);
}
inline Vec one_where_above(Vec a, Vec b) {
  return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), splat(1));
}
inline Vec look_up_values(const float* table, Vec index) {
  return _mm256_i32gather_ps(table, _mm256_cvttps_epi32(index), 4);
}
inline void store_low_bytes(uint8_t* out, Vec v) {
  const __m256i low = _mm256_shuffle_epi8(
      _mm256_castps_si256(v), _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                  0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1)));
  const __m128i pair =
      _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), pair);
}

// The eight pieces, one a lane; a piece is the number of bounds below x.
struct LineTable {
  Vec bound[7], slope, offset, cap, tie;
};
struct Lines {
  Vec slope, offset, cap;
};

inline LineTable make_line_table(const DynamicMapTables& map) {
  alignas(32) float slope[8], offset[8], cap[8];
  LineTable table;
  table.tie = splat(map.tie);
  for (int i = 0; i < 8; ++i) {
    slope[i] = map.pieces[i].slope;
    offset[i] = map.pieces[i].offset;
    cap[i] = map.pieces[i].cap;
    if (i < 7) table.bound[i] = splat(map.pieces[i].bound);
  }
  table.slope = load(slope);
  table.offset = load(offset);
  table.cap = load(cap);
  return table;
}

inline Lines lines_at(const LineTable& table, Vec x) {
  Bits piece = _mm256_setzero_si256();
  for (int i = 0; i < 7; ++i) piece = _mm256_sub_epi32(piece, above(x, table.bound[i]));
  return {_mm256_permutevar8x32_ps(table.slope, piece),
          _mm256_permutevar8x32_ps(table.offset, piece),
          _mm256_permutevar8x32_ps(table.cap, piece)};
}

struct SignedDecoder {
  const float* values;
};
struct UnsignedDecoder {
  const float* values;
};
inline SignedDecoder make_signed_decoder(const DynamicMapTables& map) {
  return {map.values};
}
inline UnsignedDecoder make_unsigned_decoder(const DynamicMapTables& map) {
  return {map.values};
}

// out = the map's values of codes[0 .. 31].
template <class Decoder>
inline void decode(const Decoder& map, const uint8_t* codes, Vec out[4]) {
  for (int i = 0; i < 4; ++i) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * i));
    out[i] = _mm256_i32gather_ps(map.values, _mm256_cvtepu8_epi32(bytes), 4);
  }
}

// Whether any 32-bit (16-bit) word, sign aside, reaches `limit`; total is a multiple of 32 bytes.
inline bool any_at_least_32(const char* bytes, int64_t total, uint32_t limit) {
  Bits top = _mm256_setzero_si256();
  const Bits magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  for (int64_t at = 0; at < total; at += 32) {
    const Bits bits = _mm256_loadu_si256(reinterpret_cast<const Bits*>(bytes + at));
    top = _mm256_max_epi32(top, _mm256_and_si256(bits, magnitude));
  }
  const Bits reached = _mm256_cmpgt_epi32(top, _mm256_set1_epi32(static_cast<int>(limit - 1)));
  return _mm256_movemask_epi8(reached) != 0;
}
inline bool any_at_least_16(const char* bytes, int64_t total, uint32_t limit) {
  Bits top = _mm256_setzero_si256();
  const Bits magnitude = _mm256_set1_epi16(0x7FFF);
  for (int64_t at = 0; at < total; at += 32) {
    const Bits bits = _mm256_loadu_si256(reinterpret_cast<const Bits*>(bytes + at));
    top = _mm256_max_epi16(top, _mm256_and_si256(bits, magnitude));
  }
  const Bits reached = _mm256_cmpgt_epi16(top, _mm256_set1_epi16(static_cast<short>(limit - 1)));
  return _mm256_movemask_epi8(reached) != 0;
}

#include "adamw8/adamw8_blocks.inc"
}  // namespace

void adamw8_update_avx2(const AdamW8Span& span) {
  update(span);
}

bool adamw8_finite_avx2(const void* data, DType dtype, int64_t count) {
  return all_finite(data, dtype, count);
}

}  // namespace halfbyte
