// The LoRA linear for AVX512-BF16: units are bf16 pairs, vdpbf16ps, 6 x 4 vectors of 16.
// The story is in lora_linear_panels.inc and lora_linear_few_rows.inc.
#include <immintrin.h>

#include "lora_linear_impl.h"
#include "simd/prelude.h"

namespace halfbyte {
namespace {
#include "simd/avx512.inc"
#include "simd/avx512vbmi.inc"
#include "nf4/nf4_decode.inc"

constexpr bool kPairs = true;
constexpr int kTileRows = 6, kTileVecs = 4;
constexpr int side_by_side(int rows) {
  return rows <= 2 ? 4 : 2;
}

inline Vec dot(Vec sum, uint32_t unit, Vec panel) {
  return _mm512_dpbf16_ps(sum,
                          reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(unit))),
                          reinterpret_cast<__m512bh>(panel));
}

// Pair (even[i], odd[i]) in 32-bit lane i, the even one low.
inline void weave(const uint16_t* even, const uint16_t* odd, uint32_t* units) {
  const Bits low =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
  const Bits high =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
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

constexpr int kScaleCodes = 64;
using ScaleMap = MapPlanes;
inline ScaleMap make_scale_map(const float* values) {
  ScaleMap result;
  for (int plane = 0; plane < 4; ++plane)
    for (int i = 0; i < 4; ++i) {
      alignas(64) uint8_t bytes[64];
      for (int j = 0; j < 64; j += kLanes) {
        const Bits entries = _mm512_loadu_si512(values + i * 64 + j);
        _mm_store_si128(
            reinterpret_cast<__m128i*>(bytes + j),
            _mm512_cvtepi32_epi8(_mm512_srli_epi32(entries, static_cast<unsigned>(8 * plane))));
      }
      result.planes[plane][i] = _mm512_load_si512(bytes);
    }
  return result;
}
inline void look_up_scales(const ScaleMap& map, const uint8_t* codes, Vec out[4]) {
  look_up_map(map, codes, out);
}

#include "lora_linear/lora_linear_panels.inc"
#include "lora_linear/lora_linear_few_rows.inc"

// --- packing straight from blocks of 64 ----------------------------------------------------------
// Where every 64-element segment has one scale, nothing of decode_span's generality is needed: a
// segment's table is one multiply and one rounding, a lookup yields 32 finished bf16.

inline bool segments_fit(const PanelSource& source, int64_t column) {
  return source.weight && source.weight->block_shift >= 6 && source.matrix.cols % 64 == 0 &&
         column % 64 == 0;
}

// The 16 levels of `levels` times `scale` as 16 words. Subnormals flush, as vdpbf16ps does anyway.
inline __m256i scaled_words(Vec levels, const float* scale) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(mul(levels, splat(*scale))));
}

// 32 elements from 16 bytes: each 16-bit word of codes is widened to a qword, whose four words take
// the nibbles high, low, high, low.
inline Bits decode_words(const uint8_t* bytes, Bits table) {
  const Bits wide = _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  const Bits shifts = _mm512_set1_epi64(0x0008000C00000004);
  return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, wide), table);
}

// Lanes are rows: 16 rows of a segment, each decoded by its table into two registers, the second
// half set aside while the first is transposed.
inline __attribute__((always_inline)) void pack_segments(const uint8_t* packed, int64_t row_bytes,
                                                         Vec levels, const float* scales,
                                                         int64_t scales_stride, uint32_t* target) {
  Bits half[kLanes];
  alignas(64) uint32_t second_half[kLanes * kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const Bits table = _mm512_broadcast_i64x4(scaled_words(levels, scales + i * scales_stride));
    half[i] = decode_words(packed + i * row_bytes, table);
    _mm512_store_si512(second_half + i * kLanes, decode_words(packed + i * row_bytes + 16, table));
  }
  store_transposed(half, target, kGroupLanes);
  transpose(second_half, kLanes, target + kLanes * kGroupLanes, kGroupLanes);
}

void pack_weight_rows(const PanelSource& source, int64_t row, int lanes, int64_t column,
                      int64_t count, void* panel) {
  if (!segments_fit(source, column) || count % 64 != 0 || lanes != lanes_to_fill(lanes))
    return pack_rows(source, row, lanes, column, count, panel);
  const Nf4Bits& bits = *source.weight;
  const Vec levels = load(bits.levels);
  const int64_t K = source.matrix.cols, units = count / 2;
  constexpr int64_t kStride = kMaxPanelUnits * 2 / 64;
  alignas(64) float scales[kLanes * kStride];
  const ScaleDecoder decoder(bits);
  for (int lane = 0; lane < lanes; lane += kLanes) {
    const int64_t first = (row + lane) * K + column;
    for (int i = 0; i < kLanes; ++i) decoder.decode(first + i * K, count, scales + i * kStride);
    for (int64_t k = 0; k < count; k += 64)
      pack_segments(bits.packed + (first + k) / 2, K / 2, levels, scales + k / 64, kStride,
                    unit_at(panel, units, k / 2, lane));
  }
}

// Lanes are the 64 columns of one segment: two rows share a table, row n in its words 0-15 and row
// n + 1 in 16-31, so a lookup yields woven pairs with no transpose.
void pack_weight_columns(const PanelSource& source, int64_t row, int64_t count, int64_t column,
                         int lanes, void* panel) {
  if (!segments_fit(source, column) || lanes != 64 || count % 2 != 0)
    return pack_columns(source, row, count, column, lanes, panel);
  const Nf4Bits& bits = *source.weight;
  const Vec levels = load(bits.levels);
  const Bits shifts = _mm512_set1_epi64(0x00080000000C0004);  // n high, n+1 high, n low, n+1 low
  const Bits nibble = _mm512_set1_epi32(0x000F000F), second_row = _mm512_set1_epi32(0x00100000);
  const int64_t K = source.matrix.cols;
  uint32_t* target = static_cast<uint32_t*>(panel);
  for (int64_t r = row; r < row + count; r += 2, target += kGroupLanes) {
    const int64_t even = r * K + column, odd = even + K;
    fetch_row(source, r + kRowsAhead, column);
    fetch_row(source, r + kRowsAhead + 1, column);
    const float scale_even = nf4_block_scale(bits, even >> bits.block_shift);
    const float scale_odd = nf4_block_scale(bits, odd >> bits.block_shift);
    const Bits table = reinterpret_cast<Bits>(
        _mm512_cvtne2ps_pbh(mul(levels, splat(scale_odd)), mul(levels, splat(scale_even))));
    for (int half = 0; half < 2; ++half) {
      const __m128i a =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits.packed + even / 2 + 16 * half));
      const __m128i b =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits.packed + odd / 2 + 16 * half));
      const __m128i pairs[2] = {_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)};
      for (int q = 0; q < 2; ++q) {
        Bits index = _mm512_multishift_epi64_epi8(shifts, _mm512_cvtepu16_epi64(pairs[q]));
        index = _mm512_ternarylogic_epi32(index, nibble, second_row, 0xEA);  // (a & b) | c
        _mm512_storeu_si512(target + (2 * half + q) * kLanes,
                            _mm512_permutexvar_epi16(index, table));
      }
    }
  }
}

constexpr PanelKernels kKernels = {kCompute, pack_weight_rows, pack_weight_columns,
                                   multiply, convert_row,      permute_activations,
                                   few_rows, add_low_rank,     dot_rows};
}  // namespace

const PanelKernels& panel_kernels_avx512bf16() {
  return kKernels;
}

}  // namespace halfbyte
