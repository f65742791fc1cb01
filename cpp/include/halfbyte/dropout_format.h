// The counter-based dropout mask: a pure function of (seed, row, column), the same on every
// backend, so backward recomputes what forward used and nothing is stored.
//
//   key  = splitmix64(seed + (row + 1) * 0x9E3779B97F4A7C15)       64 bits a row
//   h    = column ^ low32(key);  h ^= h >> 16;  h *= 0x21F0AAAD
//   h   ^= high32(key);          h ^= h >> 15;  h *= 0x735A2D97;  h ^= h >> 15
//   kept = h >= threshold,  threshold = round(p * 2^32);  a kept value is scaled by 1 / (1 - p)
//
// The mixer is a two-round 32-bit integer hash (the "lowbias32" constants), keyed between rounds so
// that rows whose low keys collide still differ.
#pragma once

#include <stdint.h>

#include "halfbyte/dtype.h"

namespace halfbyte {

struct DropoutMask {
  uint64_t seed;
  uint32_t threshold;  // 0: no dropout
  float scale;         // 1 / (1 - p)
};

constexpr uint32_t kDropoutMix1 = 0x21F0AAADu;
constexpr uint32_t kDropoutMix2 = 0x735A2D97u;

static inline DropoutMask make_dropout_mask(double p, uint64_t seed) {
  const double threshold = p * 4294967296.0 + 0.5;
  if (threshold >= 4294967296.0) return {seed, 0xFFFFFFFFu, 0.0f};  // everything dropped
  return {seed, static_cast<uint32_t>(threshold), static_cast<float>(1.0 / (1.0 - p))};
}

HALFBYTE_HOST_DEVICE static inline uint64_t dropout_row_key(uint64_t seed, int64_t row) {
  uint64_t z = seed + (static_cast<uint64_t>(row) + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ z >> 27) * 0x94D049BB133111EBull;
  return z ^ z >> 31;
}
static inline uint64_t dropout_row_key(const DropoutMask& mask, int64_t row) {
  return dropout_row_key(mask.seed, row);
}

// What is compared with the threshold.
HALFBYTE_HOST_DEVICE static inline uint32_t dropout_hash(uint64_t row_key, int64_t column) {
  uint32_t h = static_cast<uint32_t>(column) ^ static_cast<uint32_t>(row_key);
  h ^= h >> 16;
  h *= kDropoutMix1;
  h ^= static_cast<uint32_t>(row_key >> 32);
  h ^= h >> 15;
  h *= kDropoutMix2;
  h ^= h >> 15;
  return h;
}

// 1 / (1 - p) where kept, 0 where dropped.
static inline float dropout_factor(const DropoutMask& mask, uint64_t row_key, int64_t column) {
  return dropout_hash(row_key, column) >= mask.threshold ? mask.scale : 0.0f;
}

}  // namespace halfbyte
