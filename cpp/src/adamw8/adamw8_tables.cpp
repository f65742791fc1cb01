// The tables of adamw8_impl.h, made once from the embedded dynamic maps.
#include <cmath>
#include <limits>

#include "adamw8_impl.h"
#include "support/scalar.h"

namespace halfbyte {

// Code distance k -> index into the ascending map.
static int code_of(DynamicMap map, int k) {
  return map == DynamicMap::kSigned ? kDynamic8SignedZero + k : k;
}

// Piece i of the unsigned map holds k = 2^(i+1) - 1 .. 2^(i+2) - 2; of the signed map, k = 2^i ..
// 2^(i+1) - 1 and k = 0 with piece 0. Piece 7 is the value 1.0 alone.
static void make_pieces(DynamicMap map, DynamicMapTables& tables) {
  const bool is_signed = map == DynamicMap::kSigned;
  tables.tie = -1;
  for (int i = 0; i < 8; ++i) {
    const int width = 1 << (is_signed ? i : i + 1);
    int first = is_signed ? width : width - 1;
    int last = first + width - 1;
    if (i == 7) last = first;
    if (is_signed && i == 0) first = 0;
    const double low = tables.values[code_of(map, first)];
    const double high = tables.values[code_of(map, last)];
    const double slope = first == last ? 0 : (last - first) / (high - low);
    const float bound = tables.thresholds[code_of(map, last)];
    tables.pieces[i] = {bound, static_cast<float>(slope), static_cast<float>(first - slope * low),
                        last + 0.25f};
    if (is_signed && i < 7) {
      const double middle = (high + tables.values[code_of(map, last + 1)]) / 2;
      if (middle == bound) tables.tie = bound;
    }
  }
}

static int piece_of(const DynamicMapTables& tables, double x) {
  int piece = 0;
  while (piece < 7 && x > tables.pieces[piece].bound) ++piece;
  return piece;
}

static void make_exponent_lines(DynamicMapTables& tables) {
  for (int e = 0; e < 32; ++e) {
    const double start = std::ldexp(1.0, e - 31);
    const int piece = piece_of(tables, start);
    const bool crossed = piece_of(tables, 2 * start) != piece;
    const DynamicMapTables::Lines& lines = tables.pieces[piece];
    tables.bound[e] = crossed ? lines.bound : std::numeric_limits<float>::infinity();
    tables.slope[e] = lines.slope;
    tables.offset[e] = lines.offset;
    tables.cap[e] = lines.cap;
  }
}

static void make_map(DynamicMap map, DynamicMapTables& tables) {
  dynamic8_values(map, tables.values);
  dynamic8_thresholds(tables.values, tables.thresholds);
  tables.thresholds[255] = std::numeric_limits<float>::infinity();
  make_pieces(map, tables);
  make_exponent_lines(tables);
  // The unsigned encoder never rounds a non-zero value to code 0: it starts at code 1.
  tables.smallest = map == DynamicMap::kSigned ? 1e-9f : tables.values[1];
  for (int i = 0; i < 256; ++i) {
    const int code = map == DynamicMap::kSigned ? kDynamic8SignedZero + i : i;
    const uint32_t bits = code < 256 ? bits_of_float(tables.values[code]) : 0;
    tables.low_words[i] = static_cast<uint16_t>(bits);
    tables.high_words[i] = static_cast<uint16_t>(bits >> 16);
    for (int plane = 0; plane < 4; ++plane)
      tables.bytes[plane][i] = static_cast<uint8_t>(bits >> 8 * plane);
  }
}

const AdamW8Tables& adamw8_tables() {
  static const AdamW8Tables tables = [] {
    AdamW8Tables made;
    make_map(DynamicMap::kSigned, made.signed_map);
    make_map(DynamicMap::kUnsigned, made.unsigned_map);
    return made;
  }();
  return tables;
}

}  // namespace halfbyte
