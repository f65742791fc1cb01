// The 8-bit dynamic map on the device: decode by a table of 256 values, encode to the nearest value
// by one table look-up and one compare.
//
//   code(x) = #{i : x > threshold[i]}                                      (dynamic8_format.h)
//
// The leading bits of |x| (sign apart, exponent and 6 or 7 bits of mantissa) name a bin. A bin is
// narrower than the gap between two thresholds, so at most one lies inside it:
//
//   entry[bin] = limit << 8 | passed       passed: thresholds below the whole bin
//                                          limit:  the largest rest of |x|'s bits still below the
//                                                  threshold inside, all ones where there is none
//   thresholds below |x| = passed + (rest(|x|) > limit)
//
// Bins start below the smallest threshold and end below 1, whose code its neighbour below shares.
// The signed map has a second set for x < 0, where a tie goes the other way by magnitude.
//
// Why it is fast: a binary search over 255 thresholds reads shared memory eight times, and its
// first steps hit one bank; this reads it once. The tables are derived from the values at compile
// time, in integers, and copied to shared memory once a block of threads.
#pragma once

#include <stdint.h>

#include "halfbyte/dynamic8_format.h"

namespace halfbyte::cuda {

// --- tables, made at compile time
// -----------------------------------------------------------------

// A positive value of the maps, or 0, in units of 2^-46: exact.
constexpr uint64_t dynamic8_fixed(uint32_t bits) {
  return bits == 0 ? 0
                   : static_cast<uint64_t>(0x800000u | (bits & 0x7FFFFFu)) << ((bits >> 23) - 104);
}

template <int kMantissaBits, int kFirstExponent>
struct Dynamic8Bins {
  static constexpr int kRestBits = 23 - kMantissaBits;
  static constexpr int kCount = (127 - kFirstExponent) << kMantissaBits;
  static constexpr uint32_t kFirst = static_cast<uint32_t>(kFirstExponent) << kMantissaBits;
  static constexpr uint32_t kRestMask = (1u << kRestBits) - 1;
  uint32_t entry[kCount];
};

// For the ascending magnitudes magnitudes[0 .. count), magnitudes[0] = 0. `tie_passes`: a magnitude
// on the midpoint counts as above it.
template <class Bins>
constexpr Bins dynamic8_bins(const uint32_t* magnitudes, int count, bool tie_passes) {
  Bins bins{};
  int passed = 0;
  for (int bin = 0; bin < Bins::kCount; ++bin) {
    const uint32_t start = (Bins::kFirst + static_cast<uint32_t>(bin)) << Bins::kRestBits;
    const uint64_t mantissa = 0x800000u | (start & 0x7FFFFFu);
    const int shift = static_cast<int>(start >> 23) - 103;  // to units of 2^-47
    uint64_t last_below = ~0ull;  // the largest mantissa that does not pass the next threshold
    for (; passed + 1 < count; ++passed) {
      const uint64_t middle =
          dynamic8_fixed(magnitudes[passed]) + dynamic8_fixed(magnitudes[passed + 1]);
      last_below = tie_passes ? ((middle - 1) >> shift) : middle >> shift;
      if (mantissa <= last_below) break;
      last_below = ~0ull;
    }
    const uint64_t limit = last_below - mantissa;
    bins.entry[bin] = (limit < Bins::kRestMask ? static_cast<uint32_t>(limit) : Bins::kRestMask)
                          << 8 |
                      static_cast<uint32_t>(passed);
  }
  return bins;
}

using SignedBins = Dynamic8Bins<6, 105>;    // from 2^-22
using UnsignedBins = Dynamic8Bins<7, 106>;  // from 2^-21: non-zero values have codes >= 1

struct SignedBinPair {
  SignedBins positive, negative;
};

constexpr SignedBinPair make_signed_bins() {
  uint32_t below[kDynamic8SignedZero + 1] = {};
  for (int i = 0; i < kDynamic8SignedZero; ++i)
    below[kDynamic8SignedZero - i] = kDynamic8SignedBits[i] & 0x7FFFFFFFu;
  return {dynamic8_bins<SignedBins>(kDynamic8SignedBits + kDynamic8SignedZero,
                                    256 - kDynamic8SignedZero, false),
          dynamic8_bins<SignedBins>(below, kDynamic8SignedZero + 1, true)};
}

struct Dynamic8Map {
  uint32_t bits[256];
};
constexpr Dynamic8Map make_map(const uint32_t (&bits)[256]) {
  Dynamic8Map map{};
  for (int i = 0; i < 256; ++i) map.bits[i] = bits[i];
  return map;
}

static __device__ const __align__(16) SignedBinPair kSignedBins = make_signed_bins();
static __device__ const __align__(16)
    UnsignedBins kUnsignedBins = dynamic8_bins<UnsignedBins>(kDynamic8UnsignedBits, 256, false);
static __device__ const __align__(16) Dynamic8Map kSignedMap = make_map(kDynamic8SignedBits);
static __device__ const __align__(16) Dynamic8Map kUnsignedMap = make_map(kDynamic8UnsignedBits);

// --- tables in shared memory
// ----------------------------------------------------------------------

// By all threads of a block; a barrier follows. Both 16-byte aligned.
template <class Table>
__device__ __forceinline__ void copy_table(const Table& from, Table& to) {
  static_assert(sizeof(Table) % 16 == 0, "copied in 16-byte pieces");
  for (unsigned i = threadIdx.x; i < sizeof(Table) / 16; i += blockDim.x)
    reinterpret_cast<uint4*>(&to)[i] = reinterpret_cast<const uint4*>(&from)[i];
}

static __device__ __forceinline__ float decode8(const Dynamic8Map& map, uint32_t code) {
  return __uint_as_float(map.bits[code]);
}

constexpr float kBelowOne = 0.999999940395355224609375f;  // 1 - 2^-24

template <class Bins>
__device__ __forceinline__ uint32_t thresholds_below(const Bins& bins, float magnitude) {
  const uint32_t bits = __float_as_uint(magnitude);
  const uint32_t entry = bins.entry[(bits >> Bins::kRestBits) - Bins::kFirst];
  const uint32_t rest = (bits & Bins::kRestMask) << 8;
  return (entry & 0xFFu) + (rest > entry);  // passed < 256: rest > limit << 8 | passed as well
}

// The nearest code of the signed map. A NaN is below everything.
static __device__ __forceinline__ uint32_t encode8_signed(const SignedBinPair& bins, float x) {
  x = fmaxf(x, -1.0f);
  const bool negative = __float_as_uint(x) >> 31;
  const float magnitude = fminf(fmaxf(fabsf(x), 0x1p-22f), kBelowOne);
  const int below =
      static_cast<int>(thresholds_below(negative ? bins.negative : bins.positive, magnitude));
  return static_cast<uint32_t>(kDynamic8SignedZero + (negative ? -below : below));
}

// The code of the unsigned map for x > 0 that must not become zero: at least 1.
static __device__ __forceinline__ uint32_t encode8_nonzero(const UnsignedBins& bins, float x) {
  return thresholds_below(bins, fminf(fmaxf(x, 0x1p-21f), kBelowOne));
}

}  // namespace halfbyte::cuda
