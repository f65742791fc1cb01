// The LoRA linear for AMX-BF16: the panels of AVX512-BF16, multiplied tile by tile.
//
//   A   16 rows x 16 units of the activations, where they lie: 64 bytes a row, `stride` apart
//   B   16 units x 16 lanes of the panel: pairs of the reduction side by side in a lane is what
//       vdpbf16ps and TDPBF16PS both want, so a panel needs no other order
//   C   16 rows x 16 lanes of fp32 sums
//
// Two A and two B give four products, 32 rows x 32 lanes a step of 16 units: four loads for four
// products of twice a load's time. All rows go over 32 KB of the panel, which stay in L1, before
// the next 32 KB; the sums wait in `partial`.
//
// Tiles cover whole steps. What comes before (the LoRA branch, masked) and after (the last units of
// a ragged reduction, bias, the rounding to the output's type) is the vector kernel's, from and to
// `partial`, which every product must have. Sums are fp32 in the order of the steps.
#include <immintrin.h>
#include <string.h>

#include "lora_linear_impl.h"

namespace halfbyte {
namespace {

constexpr int kTile = 16;  // rows, lanes and units of a tile
constexpr int kBlockRows = 2 * kTile;
constexpr int kUnitBytes = 4;
constexpr int64_t kStepBytes = kTile * kUnitBytes;  // of a row of activations
constexpr int64_t kStepsInL1 = 16;                  // of 32 lanes: 32 KB of the panel
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
                    float* sums) {
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
  }
  _tile_stored(0, sums, kSumsRow);
  if (lane_tiles == 2) _tile_stored(1, sums + kTile, kSumsRow);
  if (row_tiles == 2) _tile_stored(2, sums + kLower, kSumsRow);
  if (row_tiles == 2 && lane_tiles == 2) _tile_stored(3, sums + kLower + kTile, kSumsRow);
}

// A product of `part.rows` rows without its main reduction: from and to `p.partial`, or from there
// to the output.
PanelProduct without_units(const PanelProduct& p) {
  PanelProduct rest = p;
  rest.units = 0;
  rest.ahead = {};
  return rest;
}

}  // namespace

void multiply_amx(const PanelProduct& p) {
  const PanelKernels& vectors = panel_kernels_avx512bf16();
  const int64_t steps = p.units / kTile, tail = p.units % kTile;
  if (p.rows < kLeastRows || steps == 0) return vectors.multiply(p);

  if (p.first_in) {
    PanelProduct first = without_units(p);
    first.store_partial = true;
    vectors.multiply(first);
  }
  const char* in = static_cast<const char*>(p.in);
  const char* panel = static_cast<const char*>(p.panel);
  bool add = p.first_in || p.load_partial;
  int64_t configured = 0;
  for (int64_t step = 0; step < steps; step += kStepsInL1) {
    const int64_t count = steps - step < kStepsInL1 ? steps - step : kStepsInL1;
    for (int lane = 0; lane < p.lanes; lane += 2 * kTile)
      for (int64_t row = 0; row < p.rows; row += kBlockRows) {
        const int64_t rows = p.rows - row < kBlockRows ? p.rows - row : kBlockRows;
        if (rows != configured) {
          const TileShapes shapes(rows);
          finish_stores();
          _tile_loadconfig(&shapes);
          configured = rows;
        }
        finish_stores();
        const bool pair = p.lanes - lane > kTile;
        const auto run = rows > kTile ? pair ? multiply_steps<2, 2> : multiply_steps<2, 1>
                         : pair       ? multiply_steps<1, 2>
                                      : multiply_steps<1, 1>;
        run(in + row * p.stride + step * kStepBytes, p.stride,
            panel + step * kTile * kPanelRowBytes + lane * kUnitBytes, count, add,
            p.partial + row * kPanelLanes + lane);
      }
    add = true;
  }
  _tile_release();

  if (p.store_partial && tail == 0) return;
  PanelProduct rest = without_units(p);
  rest.first_in = nullptr;
  rest.load_partial = true;
  rest.units = tail;
  rest.in = in + steps * kStepBytes;
  rest.panel = panel + steps * kTile * kPanelRowBytes;
  vectors.multiply(rest);
}

}  // namespace halfbyte
