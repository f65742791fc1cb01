// The LoRA linear for any processor: fp32 units, 4 x 2 vectors of 4 in the compiler's vector type.
// The story is in lora_linear_panels.inc and lora_linear_few_rows.inc.

#include "lora_linear_impl.h"
#include "simd/prelude.h"

namespace halfbyte {
namespace {
#include "simd/portable.inc"
#include "nf4/nf4_decode.inc"

constexpr bool kPairs = false;
constexpr int kTileRows = 4, kTileVecs = 2;

inline Vec dot(Vec sum, uint32_t unit, Vec panel) {
  return fma(splat(float_of_bits(unit)), panel, sum);
}
inline void weave(const uint16_t*, const uint16_t*, uint32_t*) {}  // pairs only

constexpr int kSteps = 8;
template <int j>
inline Vec weights_at(const LevelTable& table, Bits nibbles) {
  return nibble_level<j>(table, nibbles);
}
inline Vec dot_vec(Vec sum, Vec x, Vec weights) {
  return fma(x, weights, sum);
}
inline int64_t element_of(int step, int lane, int) {
  return lane * 8 + step;
}

#include "lora_linear/lora_linear_panels.inc"
#include "lora_linear/lora_linear_few_rows.inc"

constexpr PanelKernels kKernels = {kCompute,    pack_rows,           pack_columns, multiply,
                                   convert_row, permute_activations, few_rows,     dot_rows};
}  // namespace

const PanelKernels& panel_kernels_portable() {
  return kKernels;
}

}  // namespace halfbyte
