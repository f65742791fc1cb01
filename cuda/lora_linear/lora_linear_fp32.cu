// The fused product in fp32: exact multiplications and fp32 sums, any shape, forward and backward.
//
//   tile      64 rows x 64 columns, steps of 16 along d; 256 threads of 4 x 4 sums each
//   left      [d][64 rows], weight [d][64 columns] in shared memory, rows of 68 floats; a thread
//             reads four rows and four columns of a d with one 16-byte load each
//   weight    decoded in runs of 8 along the row of W (decode_run: any block, any alignment)
//   LoRA      the same loop over T and scale * L, before the main sum, masked if there is a mask
//
// Activations of another type are converted on the way in, and the weight is rounded to that type,
// so that this kernel fits every call.
#include "lora_linear/operand.cuh"
#include "lora_linear/weight_decode.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;
constexpr int kStep = 16;
constexpr int kStride = kTile + 4;
constexpr int kRun = 8;

using Tile = float[kStep][kStride];

__device__ __forceinline__ float rounded(float value, DType dtype) {
  if (dtype == DType::kBFloat16) return to_float(from_float<__nv_bfloat16>(value));
  if (dtype == DType::kFloat16) return to_float(from_float<__half>(value));
  return value;
}

// tile[d][row] = matrix[row0 + row, d0 + d] * scale of a [rows, cols] matrix, 0 outside.
__device__ __forceinline__ void fill_rows(Tile& tile, const Operand& matrix, int64_t rows,
                                          int64_t cols, int64_t row0, int64_t d0, float scale) {
#pragma unroll
  for (int part = 0; part < kTile * kStep / kThreads; ++part) {
    const int i = part * kThreads + threadIdx.x;
    const int row = i / kStep, d = i % kStep;
    const bool inside = row0 + row < rows && d0 + d < cols;
    tile[d][row] = inside ? load_element(matrix, (row0 + row) * cols + d0 + d) * scale : 0.0f;
  }
}

// tile[d][col] = matrix[d0 + d, col0 + col] * scale.
__device__ __forceinline__ void fill_columns(Tile& tile, const Operand& matrix, int64_t rows,
                                             int64_t cols, int64_t d0, int64_t col0, float scale) {
#pragma unroll
  for (int part = 0; part < kTile * kStep / kThreads; ++part) {
    const int i = part * kThreads + threadIdx.x;
    const int d = i / kTile, col = i % kTile;
    const bool inside = d0 + d < rows && col0 + col < cols;
    tile[d][col] = inside ? load_element(matrix, (d0 + d) * cols + col0 + col) * scale : 0.0f;
  }
}

// tile[d][column] = W'[d0 + d, j0 + column].
__device__ __forceinline__ void fill_weight(Tile& tile, const Product& p,
                                            const DecodeTables& tables, int64_t d0, int64_t j0) {
  const int64_t row0 = p.transposed ? d0 : j0, col0 = p.transposed ? j0 : d0;
  const int64_t rows = p.transposed ? p.D : p.J, cols = p.transposed ? p.J : p.D;
  const int runs = (p.transposed ? kTile : kStep) / kRun;
  const int i = threadIdx.x;
  if (i >= kTile * kStep / kRun) return;
  const int row = i / runs, col = i % runs * kRun;
  const int64_t left_over = cols - col0 - col;
  float run[kRun] = {};
  if (row0 + row < rows && left_over > 0)
    decode_run(p.weight.bits, tables, (row0 + row) * cols + col0 + col,
               left_over < kRun ? static_cast<int>(left_over) : kRun, run);
#pragma unroll
  for (int c = 0; c < kRun; ++c)
    tile[p.transposed ? row : col + c][p.transposed ? col + c : row] =
        rounded(run[c], p.left.dtype);
}

__device__ __forceinline__ void add_step(float (&sums)[4][4], const Tile& left, const Tile& right,
                                         int ty, int tx) {
#pragma unroll
  for (int d = 0; d < kStep; ++d) {
    const float4 a = *reinterpret_cast<const float4*>(&left[d][4 * ty]);
    const float4 b = *reinterpret_cast<const float4*>(&right[d][4 * tx]);
    const float rows[4] = {a.x, a.y, a.z, a.w}, columns[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(rows[i], columns[j], sums[i][j]);
  }
}

__device__ __forceinline__ void add_lora(float (&sums)[4][4], const Product& p, Tile& left,
                                         Tile& right, int64_t m0, int64_t j0, int ty, int tx) {
  const Operand t = {const_cast<float*>(p.lora_left), DType::kFloat32};
  for (int64_t r0 = 0; r0 < p.R; r0 += kStep) {
    __syncthreads();  // the step before has been read
    fill_rows(left, t, p.M, p.R, m0, r0, 1.0f);
    if (p.transposed)
      fill_columns(right, p.lora_right, p.R, p.J, r0, j0, p.lora_scale);
    else
      fill_rows(right, p.lora_right, p.J, p.R, j0, r0, p.lora_scale);
    __syncthreads();
    add_step(sums, left, right, ty, tx);
  }
  if (!p.dropout.threshold) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint64_t key = dropout_row_key(p.dropout, m0 + 4 * ty + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool kept = dropout_keeps(p.dropout, key, j0 + 4 * tx + j);
      sums[i][j] = kept ? sums[i][j] * p.dropout.scale : 0.0f;
    }
  }
}

__global__ void __launch_bounds__(kThreads) lora_linear_fp32(const __grid_constant__ Product p) {
  __shared__ __align__(16) Tile left;
  __shared__ __align__(16) Tile right;
  __shared__ DecodeTables tables;

  // Set-up: this block's tile, this thread's 4 x 4 of it, this split's steps.
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16, split = blockIdx.z;
  const int64_t m0 = int64_t{blockIdx.x} * kTile, j0 = int64_t{blockIdx.y} * kTile;
  const int64_t steps = (p.D + kStep - 1) / kStep;
  const int64_t begin = steps * split / p.splits, end = steps * (split + 1) / p.splits;
  load_decode_tables<kThreads>(p.weight, tables);

  float sums[4][4] = {};
  if (split == 0 && p.R) add_lora(sums, p, left, right, m0, j0, ty, tx);
  for (int64_t step = begin; step < end; ++step) {
    __syncthreads();  // the tables are there; the step before has been read
    fill_rows(left, p.left, p.M, p.D, m0, step * kStep, 1.0f);
    fill_weight(right, p, tables, step * kStep, j0);
    __syncthreads();
    add_step(sums, left, right, ty, tx);
  }

  float bias[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t column = j0 + 4 * tx + j;
    bias[j] = p.bias.data && column < p.J ? load_element(p.bias, column) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t m = m0 + 4 * ty + i, column = j0 + 4 * tx + j;
      if (m >= p.M || column >= p.J) continue;
      if (p.splits > 1)
        p.partials[(split * p.M + m) * p.J + column] = sums[i][j];
      else
        store_element(p.out, m * p.J + column, sums[i][j] + bias[j]);
    }
}

// out = bias + partials[0] + partials[1] + ..., a thread an element.
__global__ void __launch_bounds__(kThreads)
    lora_linear_sum_partials(const __grid_constant__ Product p) {
  const int64_t count = p.M * p.J, i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  float sum = p.bias.data ? load_element(p.bias, i % p.J) : 0.0f;
  for (int split = 0; split < p.splits; ++split) sum += p.partials[split * count + i];
  store_element(p.out, i, sum);
}

}  // namespace

int fp32_splits(const Product& p) {
  return split_count(tile_count(p, kTile, kTile), ceil_div(p.D, kStep), 16, 16);
}

void launch_fp32(const Product& p, cudaStream_t stream) {
  const dim3 grid = tile_grid(p, kTile, kTile);
  lora_linear_fp32<<<grid, kThreads, 0, stream>>>(p);
}

void launch_sum_partials(const Product& p, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>(ceil_div(p.M * p.J, kThreads));
  lora_linear_sum_partials<<<grid, kThreads, 0, stream>>>(p);
}

}  // namespace halfbyte::cuda
