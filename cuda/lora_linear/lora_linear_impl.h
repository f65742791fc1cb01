// What the variants of the LoRA linear share on the host's side: the two shapes of a product.
//
// A Product is the part that reads the packed weight. Forward and backward differ only in which
// side of W is summed over:
//
//   out[m, j] = sum_d left[m, d] W'[d, j]  +  mask(m, j) * scale * sum_r t[m, r] L[r, j]  + bias[j]
//
//   forward    left x  [M, K]   W'[d, j] = W[j, d]   t = T  L[r, j] = B[j, r]  scale s   no mask
//   backward   left dY [M, N]   W'[d, j] = W[d, j]   t = U  L[r, j] = A[r, j]  scale 1   mask'
//
// A SkinnyProduct is one of the four that read no weight: T, U, dA and dB (lora_linear_lora.cu).
//
// A reduction may be split: split z sums its own range of d into partials[z], and a second pass
// adds them in the order of z. No sum is ever formed by atomics, so that results are bit-identical
// from run to run; how a product is split depends on its shape alone.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "device/launch.h"
#include "halfbyte/cuda/api.h"

namespace halfbyte::cuda {

struct Dropout {
  const int64_t* seed;  // [1] on the device
  uint32_t threshold;   // 0: nothing is dropped
  float scale;          // of what is kept
};

struct Product {
  int64_t M, J, D, R;  // rows, columns of out, length of the sum, rank (0: no LoRA part)
  Operand left;        // [M, D]
  Weight weight;       // [J, D], or [D, J] when transposed
  bool transposed;
  const float* lora_left;  // [M, R]
  Operand lora_right;      // [J, R], or [R, J] when transposed
  float lora_scale;
  Dropout dropout;  // of the LoRA part, over (m, j)
  Operand bias;     // [J] or not given
  Operand out;      // [M, J], left's dtype
  float* partials;  // [splits, M, J] when splits > 1
  int splits;
};

// A matrix whose rows are the shared index d of a skinny product, or whose columns are.
struct SkinnyOperand {
  Operand matrix;  // [rows, cols]
  int64_t rows, cols;
  bool reduce_rows;  // true: matrix[d, i], false: matrix[i, d]
  Dropout dropout;   // over (row, col)
};

// out(i, j) = alpha * sum_d left(i, d) right(j, d)
struct SkinnyProduct {
  int64_t I, J, D;
  SkinnyOperand left, right;
  float alpha;
  Operand out;  // element (i, j) at i * out_i + j * out_j
  int64_t out_i, out_j;
  float* partials;  // [splits, I, J] when splits > 1
  int splits;
};

// Parts of a sum of `steps` steps, so that `tiles` tiles occupy a device: a function of the shape
// alone. 256 blocks are about one wave of two a multiprocessor on the devices aimed at.
inline int split_count(int64_t tiles, int64_t steps, int64_t least_steps, int most) {
  const int64_t wanted = (256 + tiles - 1) / (tiles > 0 ? tiles : 1);
  int64_t splits = steps / least_steps;
  if (splits > wanted) splits = wanted;
  if (splits > most) splits = most;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

// The output of a product in tiles of `rows` x `columns`: how many, and their grid with its splits.
inline int64_t tile_count(const Product& p, int64_t rows, int64_t columns) {
  return ceil_div(p.M, rows) * ceil_div(p.J, columns);
}
inline dim3 tile_grid(const Product& p, int64_t rows, int64_t columns) {
  return dim3(static_cast<unsigned>(ceil_div(p.M, rows)),
              static_cast<unsigned>(ceil_div(p.J, columns)), static_cast<unsigned>(p.splits));
}

// Each variant: how it splits a product, and its launch.
int few_rows_splits(const Product& product);
void launch_few_rows(const Product& product, cudaStream_t stream);
int few_rows_fma_splits(const Product& product);
void launch_few_rows_fma(const Product& product, cudaStream_t stream);
int sm80_splits(const Product& product);
void launch_sm80(const Product& product, cudaStream_t stream);
int any_shape_splits(const Product& product);
void launch_any_shape(const Product& product, cudaStream_t stream);
int fp32_splits(const Product& product);
void launch_fp32(const Product& product, cudaStream_t stream);

// out = bias + partials[0] + partials[1] + ...
void launch_sum_partials(const Product& product, cudaStream_t stream);

// The skinny products: 16-bit activations go to launch_skinny_sm80.
constexpr int kSkinnyTile = 64, kSkinnyStep = 32;  // i and j of a block, a step along d
inline dim3 skinny_grid(const SkinnyProduct& p) {
  return dim3(static_cast<unsigned>(ceil_div(p.I, kSkinnyTile)),
              static_cast<unsigned>(ceil_div(p.J, kSkinnyTile)), static_cast<unsigned>(p.splits));
}
int skinny_splits(const SkinnyProduct& product);
void launch_skinny(const SkinnyProduct& product, cudaStream_t stream);
void launch_skinny_sm80(const SkinnyProduct& product, cudaStream_t stream);

// out[n] = sum_m matrix[m, n], through partials [column_sum_splits(M, N), N].
int column_sum_splits(int64_t M, int64_t N);
void launch_column_sum(Operand matrix, int64_t M, int64_t N, Operand out, float* partials,
                       cudaStream_t stream);

}  // namespace halfbyte::cuda
