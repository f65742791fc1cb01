// The LoRA linear for any processor: fp32 units, 4 x 2 vectors of 4 in the compiler's vector type.
// The story is in lora_linear_panels.inc and lora_linear_few_rows.inc.

#include "lora_linear_impl.h"
#include "simd/prelude.h"

namespace halfbyte {
namespace {
#include "simd/portable.inc"
#include "nf4/nf4_decode.inc"

constexpr int kTileRows = 4, kTileVecs = 2;
constexpr int side_by_side(int rows) {
  return rows <= 2 ? 4 : 2;
}
#include "lora_linear/lora_linear_fp32_units.inc"
#include "lora_linear/lora_linear_panels.inc"
#include "lora_linear/lora_linear_few_rows.inc"

constexpr PanelKernels kKernels = {kCompute, pack_rows,    pack_columns,
                                   multiply, convert_row,  permute_activations,
                                   few_rows, add_low_rank, dot_rows};
}  // namespace

const PanelKernels& panel_kernels_portable() {
  return kKernels;
}

}  // namespace halfbyte
