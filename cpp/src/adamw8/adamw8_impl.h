// What adamw8.cpp and its variants share: look-up tables, a span of blocks.
#pragma once

#include <stdint.h>

#include "halfbyte/adamw8_format.h"

namespace halfbyte {

// One dynamic map, with what a vector encoder needs.
//
// Each decade of the map is evenly spaced, so the code of a magnitude is near slope * x + offset
// with the line of its decade ("piece"). Pieces are told apart exactly, by comparing with the
// threshold between them (`bound`, the last is infinite); `cap` keeps the wide gap above a piece on
// its last code. Whoever lands near the middle of two codes, or on `tie` (the one bound that fp32
// holds exactly, where the sign decides), is settled by `thresholds`; a line's own error is below
// 5e-5 codes (the last bits of 128 * x, of slope and offset, and of the map's values). Lines count
// k = code for the unsigned map, k = |code - 127| for the signed one.
struct DynamicMapTables {
  float values[256];
  float thresholds[256];  // [255] is infinite
  struct Lines {
    float bound, slope, offset, cap;
  } pieces[8];
  // The same lines by exponent: entry e serves x in [2^(e-31), 2^(e-30)) up to its bound, and entry
  // e + 1 what lies above the bound.
  alignas(64) float bound[32], slope[32], offset[32], cap[32];
  float tie;
  float smallest;  // magnitudes are raised to this: it has the same code, and an exponent in range
  // The bit patterns of values[0..255] (unsigned map) or values[127..254] (signed map: magnitudes
  // of k = 0..127) as two planes of 16-bit words.
  alignas(64) uint16_t low_words[256], high_words[256];
  alignas(64) uint8_t bytes[4][256];
};

struct AdamW8Tables {
  DynamicMapTables signed_map, unsigned_map;
};
const AdamW8Tables& adamw8_tables();

// Blocks first .. last - 1 of one tensor.
struct AdamW8Span {
  const AdamW8Tensor* tensor;
  const AdamW8Scalars* scalars;
  const AdamW8Tables* tables;
  int64_t first, last;
};

using AdamW8Update = void (*)(const AdamW8Span& span);
// Whether `count` elements at `data` are all finite.
using AdamW8Finite = bool (*)(const void* data, DType dtype, int64_t count);

void adamw8_update_reference(const AdamW8Span& span);
bool adamw8_finite_reference(const void* data, DType dtype, int64_t count);
void adamw8_update_avx2(const AdamW8Span& span);
bool adamw8_finite_avx2(const void* data, DType dtype, int64_t count);
void adamw8_update_avx512bf16(const AdamW8Span& span);
bool adamw8_finite_avx512bf16(const void* data, DType dtype, int64_t count);
void adamw8_update_avx512(const AdamW8Span& span);
bool adamw8_finite_avx512(const void* data, DType dtype, int64_t count);

}  // namespace halfbyte
