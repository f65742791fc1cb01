// What the variants of the LoRA linear share: plain arguments, and the panel kernels a variant
// offers.
//
// Every product here has one shape, rows x panel:
//
//   out[m, lane] = sum_d in[m, d] * panel[d, lane]        64 lanes a panel
//
// forward: lanes are output features, d runs over K; backward: lanes are input features, d runs
// over N; dA, dB: d runs over M. Only the way a panel is packed differs. A unit is 32 bits of
// reduction: one fp32, or a pair of bf16 (d, d+1) where the processor multiplies those.
//
//   panel memory   [group][unit][lanes of the group]: a group is what one register tile covers
#pragma once

#include <stdint.h>

#include "halfbyte/dropout_format.h"
#include "halfbyte/dtype.h"
#include "halfbyte/nf4_format.h"

namespace halfbyte {

constexpr int kPanelLanes = 64;
constexpr int64_t kMaxPanelUnits = 2048;  // 512 KB a panel: half of a 1 MB L2

// A row-major matrix; rows are `stride` elements apart.
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows;
  int64_t cols;
  int64_t stride;
};

struct ForwardArgs {
  Matrix x;        // [M, K]
  Nf4Bits weight;  // [N, K]
  Matrix bias;     // [1, N]; data null: none
  Matrix lora_a;   // [R, K]; data null: none
  Matrix lora_b;   // [N, R]
  float scaling;
  DropoutMask dropout;
  Matrix y;  // out [M, N]
  Matrix t;  // out [M, R]
  int threads;
};

struct BackwardArgs {
  Matrix dy;  // [M, N]
  Matrix x;   // [M, K]
  Nf4Bits weight;
  Matrix lora_a;
  Matrix lora_b;
  Matrix t;  // [M, R]
  float scaling;
  DropoutMask dropout;
  int64_t in_features;
  Matrix dx, d_lora_a, d_lora_b, d_bias;  // out; data null: not wanted
  int threads;
};

// What a panel is packed from: a packed weight, or a matrix times `scale` with an optional mask.
struct PanelSource {
  const Nf4Bits* weight;   // rows of `matrix.cols` elements, or null
  DType weight_precision;  // what decoded values are rounded to
  Matrix matrix;           // data null when `weight` is given; rows and cols always set
  float scale;
  DropoutMask dropout;  // threshold 0: none; over (row, column) of `matrix`
};

// Memory that the next panel will be packed from, fetched while this one is multiplied: with each
// unit of the reduction one address, `count` of them, `step` bytes apart.
struct Ahead {
  const char* next;
  int64_t step;
  int64_t count;
};

// out (+)= first + in * panel, for `rows` rows and `lanes` <= 64 lanes.
struct PanelProduct {
  int64_t rows;
  int lanes;
  const void* first_in;  // optional: a reduction that comes before the main one
  int64_t first_stride;  // bytes
  const void* first_panel;
  int64_t first_units;
  DropoutMask first_mask;  // applied to the sum of the first reduction, over (row, column)
  int64_t mask_row, mask_column;
  const void* in;
  int64_t stride;  // bytes
  const void* panel;
  int64_t units;
  float* partial;      // [rows][64] sums of the chunks so far, or null
  bool load_partial;   // start from `partial`
  bool store_partial;  // end in `partial` instead of `out`
  const float* bias;   // [64] or null
  void* out;
  DType out_dtype;
  int64_t out_stride;  // elements
  Ahead ahead;
};

// Few rows: out[m, n - first] = x[m] . W[n] for n in [first, last).
struct FewRows {
  const Nf4Bits* weight;
  int64_t K;
  const void* x;          // permuted by permute_activations
  int64_t rows;           // M <= kFewRows
  int64_t first, last;    // output features
  float* scales;          // scratch [4][scales_stride]
  int64_t scales_stride;  // K / 64 rounded up to whole chunks
  float* out;             // [rows][out_stride]
  int64_t out_stride;
};
constexpr int64_t kFewRows = 8;
constexpr int64_t kFewRowsChunk = 128;  // the longest chunk of any variant

struct PanelKernels {
  DType compute;  // kBFloat16: units are pairs; kFloat32: units are single
  // Lanes are rows [row, row + lanes) of the source, units run over columns [column, column +
  // count).
  void (*pack_rows)(const PanelSource& source, int64_t row, int lanes, int64_t column,
                    int64_t count, void* panel);
  // Lanes are columns [column, column + lanes), units run over rows [row, row + count).
  void (*pack_columns)(const PanelSource& source, int64_t row, int64_t count, int64_t column,
                       int lanes, void* panel);
  void (*multiply)(const PanelProduct& product);
  // Row `row` of the source in the compute type, zero-padded to whole units.
  void (*convert_row)(const PanelSource& source, int64_t row, void* out);
  // For few rows: x in the order that `few_rows` reads, [rows][K rounded up to whole chunks].
  void (*permute_activations)(const Matrix& x, void* out);
  void (*few_rows)(const FewRows& few);
  // For few rows: out[m][n - first] += scaling * sum_r t[m, r] b[n, r], n in [first, last).
  void (*add_low_rank)(const Matrix& t, const Matrix& b, float scaling, int64_t first, int64_t last,
                       float* out, int64_t out_stride);
  // sum_k drop(a[row_a, k]) b[row_b, k]
  float (*dot_rows)(const Matrix& a, int64_t row_a, const Matrix& b, int64_t row_b,
                    const DropoutMask& mask);
  // Up to so many rows `few_rows` is faster than panels; at most kFewRows.
  int64_t most_few_rows = kFewRows;
};

const PanelKernels& panel_kernels_portable();
const PanelKernels& panel_kernels_avx2();
const PanelKernels& panel_kernels_avx512();
const PanelKernels& panel_kernels_avx512bf16();
const PanelKernels& panel_kernels_amx();

// `multiply` of AMX-BF16 over the panels of AVX512-BF16.
void multiply_amx(const PanelProduct& product);

// How many times faster bf16 pairs are than fp32 units on this processor, measured once. Call it
// only where AVX512-BF16 is there.
double bf16_speedup();

void forward_with_panels(const PanelKernels& kernels, const ForwardArgs& args);
// Few enough rows for these kernels, K % 64 == 0, blocks of at least 64.
bool few_rows_fit(const PanelKernels& kernels, const ForwardArgs& args);
void forward_with_few_rows(const PanelKernels& kernels, const ForwardArgs& args);
void backward_with_panels(const PanelKernels& kernels, const BackwardArgs& args);
void forward_reference(const ForwardArgs& args);
void backward_reference(const BackwardArgs& args);

}  // namespace halfbyte
