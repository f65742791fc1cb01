// The LoRA linear for AMX-BF16: the panels of AVX512-BF16, multiplied tile by tile.
//
//   A   16 rows x 16 units of the activations, where they lie: 64 bytes a row, `stride` apart
//   B   16 units x 16 lanes of the panel: pairs of the reduction side by side in a lane is what
//       vdpbf16ps and TDPBF16PS both want, so a panel needs no other order
//   C   16 rows x 16 lanes of fp32 sums
//
// Two A and two B give four products, 32 rows x 32 lanes a step of 16 units: four loads for four
// products of twice a load's time. A step reads 4 KB, and the panel stays in L2.
//
// Tiles cover whole steps. What comes before (the LoRA branch, masked) and after (the last units of
// a ragged reduction, bias, the rounding to the output's type) is the vector kernel's, which meets
// the tiles in 32 x 64 sums in L1. Sums are fp32 in the order of the steps, whatever the threads.
#include <immintrin.h>

#include "lora_linear_impl.h"

namespace halfbyte {
namespace {

constexpr int kTile = 16;  // rows, lanes and units of a tile
constexpr int kBlockRows = 2 * kTile;
constexpr int kUnitBytes = 4;
constexpr int64_t kStepBytes = kTile * kUnitBytes;  // of a row of activations
constexpr int64_t kPanelRowBytes = kPanelLanes * kUnitBytes;
constexpr int64_t kLeastRows = 4;  // fewer are as fast in vectors

// Tiles 0-3 are C, [row tile][lane tile]; 4, 5 are A; 6, 7 are B.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_a_row[16] = {};
  uint8_t rows[16] = {};

  explicit TileShapes(int64_t block_rows) {
    for (int tile = 0; tile < 8; ++tile) {
      bytes_a_row[tile] = 64;
      rows[tile] = kTile;
    }
    const int64_t upper = block_rows < kTile ? block_rows : kTile, lower = block_rows - upper;
    rows[0] = rows[1] = rows[4] = static_cast<uint8_t>(upper);
    rows[2] = rows[3] = rows[5] = static_cast<uint8_t>(lower ? lower : kTile);
  }
};

// The intrinsics do not tell the compiler what memory a tile load reads.
inline void finish_stores() {
  __asm__ volatile("" ::: "memory");
}

// sums[row, lane] (+)= in * panel over `steps` steps, for 16 or 32 rows by 16 or 32 lanes.
template <int row_tiles, int lane_tiles>
void multiply_steps(const char* in, int64_t stride, const char* panel, int64_t steps, bool add,
                    float* sums, Ahead& ahead, int64_t lines_a_step) {
  constexpr int64_t kSumsRow = kPanelLanes * sizeof(float);
  constexpr int64_t kLower = kTile * kPanelLanes;
  if (add) {
    _tile_loadd(0, sums, kSumsRow);
    if (lane_tiles == 2) _tile_loadd(1, sums + kTile, kSumsRow);
    if (row_tiles == 2) _tile_loadd(2, sums + kLower, kSumsRow);
    if (row_tiles == 2 && lane_tiles == 2) _tile_loadd(3, sums + kLower + kTile, kSumsRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const char* left = in + step * kStepBytes;
    const char* right = panel + step * kTile * kPanelRowBytes;
    _tile_loadd(6, right, kPanelRowBytes);
    _tile_loadd(4, left, stride);
    _tile_dpbf16ps(0, 4, 6);
    if (lane_tiles == 2) {
      _tile_loadd(7, right + kTile * kUnitBytes, kPanelRowBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (row_tiles == 2) {
      _tile_loadd(5, left + kTile * stride, stride);
      _tile_dpbf16ps(2, 5, 6);
      if (lane_tiles == 2) _tile_dpbf16ps(3, 5, 7);
    }
    for (int64_t line = 0; line < lines_a_step && ahead.count > 0; ++line) {
      __builtin_prefetch(ahead.next, 0, 2);
      ahead.next += ahead.step;
      --ahead.count;
    }
  }
  _tile_stored(0, sums, kSumsRow);
  if (lane_tiles == 2) _tile_stored(1, sums + kTile, kSumsRow);
  if (row_tiles == 2) _tile_stored(2, sums + kLower, kSumsRow);
  if (row_tiles == 2 && lane_tiles == 2) _tile_stored(3, sums + kLower + kTile, kSumsRow);
}

// Rows [row, row + rows) of a product, its partial sums in `sums`.
PanelProduct rows_of(const PanelProduct& p, int64_t row, int64_t rows, float* sums) {
  PanelProduct part = p;
  part.rows = rows;
  part.in = static_cast<const char*>(p.in) + row * p.stride;
  if (p.first_in) part.first_in = static_cast<const char*>(p.first_in) + row * p.first_stride;
  part.mask_row += row;
  part.partial = sums;
  const int64_t out_bytes = p.out_dtype == DType::kFloat32 ? 4 : 2;
  part.out = static_cast<char*>(p.out) + row * p.out_stride * out_bytes;
  part.ahead = {};
  return part;
}

}  // namespace

void multiply_amx(const PanelProduct& p) {
  const PanelKernels& vectors = panel_kernels_avx512bf16();
  const int64_t steps = p.units / kTile, tail = p.units % kTile;
  if (p.rows < kLeastRows || steps == 0) return vectors.multiply(p);

  alignas(64) float own_sums[kBlockRows * kPanelLanes];
  Ahead ahead = p.ahead;
  int64_t configured = 0;
  for (int64_t row = 0; row < p.rows; row += kBlockRows) {
    const int64_t rows = p.rows - row < kBlockRows ? p.rows - row : kBlockRows;
    float* sums = p.partial ? p.partial + row * kPanelLanes : own_sums;
    const PanelProduct part = rows_of(p, row, rows, sums);
    if (p.first_in) {
      PanelProduct first = part;
      first.units = 0;
      first.store_partial = true;
      vectors.multiply(first);
    }

    if (rows != configured) {
      const TileShapes shapes(rows);
      finish_stores();
      _tile_loadconfig(&shapes);
      configured = rows;
    }
    finish_stores();
    const bool add = p.first_in || p.load_partial;
    const bool last = row + kBlockRows >= p.rows;
    const char* panel = static_cast<const char*>(p.panel);
    const char* in = static_cast<const char*>(part.in);
    for (int lane = 0; lane < p.lanes; lane += 2 * kTile) {
      const int64_t steps_left = steps * ((p.lanes - lane + 2 * kTile - 1) / (2 * kTile));
      const int64_t lines = last ? (ahead.count + steps_left - 1) / steps_left : 0;
      const auto run = rows > kTile
                           ? p.lanes - lane > kTile ? multiply_steps<2, 2> : multiply_steps<2, 1>
                       : p.lanes - lane > kTile ? multiply_steps<1, 2>
                                                : multiply_steps<1, 1>;
      run(in, p.stride, panel + lane * kUnitBytes, steps, add, sums + lane, ahead, lines);
    }

    if (p.store_partial && tail == 0) continue;
    PanelProduct rest = part;
    rest.first_in = nullptr;
    rest.load_partial = true;
    rest.units = tail;
    rest.in = in + steps * kStepBytes;
    rest.panel = panel + steps * kTile * kPanelRowBytes;
    vectors.multiply(rest);
  }
  _tile_release();
}

}  // namespace halfbyte
