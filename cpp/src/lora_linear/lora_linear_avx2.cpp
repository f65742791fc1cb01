// The LoRA linear for AVX2: fp32 units, 6 x 2 vectors of 8.
// The story is in lora_linear_panels.inc and lora_linear_few_rows.inc.
#include <immintrin.h>

#include "lora_linear_impl.h"
#include "simd/prelude.h"

namespace halfbyte {
namespace {
#include "simd/avx2.inc"
#include "nf4/nf4_decode.inc"

constexpr int kTileRows = 6, kTileVecs = 2;
constexpr int side_by_side(int) {
  return 1;  // the look-ups of one row fill the registers
}
#include "lora_linear/lora_linear_fp32_units.inc"
#include "lora_linear/lora_linear_panels.inc"
#include "lora_linear/lora_linear_few_rows.inc"

constexpr PanelKernels kKernels = {kCompute, pack_rows,    pack_columns,
                                   multiply, convert_row,  permute_activations,
                                   few_rows, add_low_rank, dot_rows};
}  // namespace

const PanelKernels& panel_kernels_avx2() {
  return kKernels;
}

}  // namespace halfbyte
