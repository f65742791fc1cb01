// The products of the LoRA branch that read no packed weight, and column sums:
//
//   T  [M, R] = drop(x) A^T       sum over k        dA [R, K] = U^T drop(x)      sum over m
//   U  [M, R] = s dY B            sum over n        dB [N, R] = s dY^T T         sum over m
//   dbias [N] = sum_m dY
//
// The first four are out(i, j) = alpha * sum_d left(i, d) right(j, d) with j < R, the rank, and
// `left` an activation, which is read once for 64 ranks: lora_linear_skinny_sm80.cu for 16-bit
// activations, and here for fp32, with exact multiplications:
//
//   tile      64 i x 64 j, steps of 32 along d; a thread has 4 i of one warp and 8 j
//   shared    a matrix whose columns are d lies as [64][32 + 4], one whose rows are d as
//             [32][64 + 8]: each is filled along its rows in memory, four elements at a time
//   dropout   a dropped element of x is replaced by 0, so it may be anything; 1 / (1 - p) is part
//             of alpha
//
// The next step's elements are read while this step's are multiplied. d is split over blocks where
// the tiles alone would not fill a device; a second pass adds the parts in their order.
#include "lora_linear/skinny_operand.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = kSkinnyTile, kStep = kSkinnyStep;
constexpr int kRuns = kTile * kStep / kRun / kThreads;  // a thread's
constexpr int kStrideByRow = kStep + 4, kStrideByStep = kTile + 8;
constexpr int kTileFloats = kTile * kStrideByRow;
static_assert(kTileFloats == kStep * kStrideByStep, "both layouts fill the same memory");

// --- from memory to shared memory ----------------------------------------------------------------

struct Position {
  int row, col;
};

// Where run `run` of this thread lies in the tile, in rows and columns of the matrix.
__device__ __forceinline__ Position run_position(const SkinnyOperand& operand, int run) {
  const int i = threadIdx.x + run * kThreads,
            per_row = (operand.reduce_rows ? kTile : kStep) / kRun;
  return {i / per_row, i % per_row * kRun};
}

// Of a run that starts at (row, col); dropped elements become 0.
__device__ __forceinline__ void drop_run(float4& run, const Dropout& dropout, int64_t row,
                                         int64_t col) {
  const uint64_t key = dropout_row_key(dropout, row);
  if (!dropout_keeps(dropout, key, col)) run.x = 0;
  if (!dropout_keeps(dropout, key, col + 1)) run.y = 0;
  if (!dropout_keeps(dropout, key, col + 2)) run.z = 0;
  if (!dropout_keeps(dropout, key, col + 3)) run.w = 0;
}

__device__ __forceinline__ void fetch_tile(float4 (&runs)[kRuns], const SkinnyOperand& operand,
                                           bool aligned, int64_t first, int64_t d0) {
  const int64_t row0 = operand.reduce_rows ? d0 : first, col0 = operand.reduce_rows ? first : d0;
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    const Position at = run_position(operand, run);
    const int64_t row = row0 + at.row, col = col0 + at.col;
    runs[run] = load_run(operand.matrix, aligned, row * operand.cols + col,
                         row < operand.rows ? operand.cols - col : 0);
    if (operand.dropout.threshold) drop_run(runs[run], operand.dropout, row, col);
  }
}

__device__ __forceinline__ void store_tile(float* tile, const float4 (&runs)[kRuns],
                                           const SkinnyOperand& operand) {
  const int stride = operand.reduce_rows ? kStrideByStep : kStrideByRow;
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    const Position at = run_position(operand, run);
    *reinterpret_cast<float4*>(tile + at.row * stride + at.col) = runs[run];
  }
}

// --- products ------------------------------------------------------------------------------------

// Element (i, d) of a tile lies at i * along_i + d * along_d.
struct TileView {
  const float* data;
  int along_i, along_d;
  __device__ __forceinline__ float at(int i, int d) const {
    return data[i * along_i + d * along_d];
  }
};

__device__ __forceinline__ TileView view(const float* tile, const SkinnyOperand& operand) {
  return operand.reduce_rows ? TileView{tile, 1, kStrideByStep} : TileView{tile, kStrideByRow, 1};
}

__global__ void __launch_bounds__(kThreads, 3)
    lora_linear_skinny(const __grid_constant__ SkinnyProduct p) {
  __shared__ __align__(16) float left[kTileFloats];
  __shared__ __align__(16) float right[kTileFloats];

  // Set-up: this block's tile, this thread's 4 x 8 of it, this split's steps.
  const int split = blockIdx.z, lane = threadIdx.x % 32;
  const int i = threadIdx.x / 32 * 16 + lane / 8 * 4, j = lane % 8;
  const int64_t i0 = int64_t{blockIdx.x} * kTile, j0 = int64_t{blockIdx.y} * kTile;
  const int64_t steps = (p.D + kStep - 1) / kStep;
  const int64_t begin = steps * split / p.splits, end = steps * (split + 1) / p.splits;
  const int ranks = p.J - j0 < kTile ? static_cast<int>(p.J - j0) : kTile;
  const bool left_aligned = runs_are_aligned(p.left), right_aligned = runs_are_aligned(p.right);
  const TileView left_view = view(left, p.left), right_view = view(right, p.right);

  float sums[4][8] = {};
  float4 left_runs[kRuns], right_runs[kRuns];
  if (begin < end) {
    fetch_tile(left_runs, p.left, left_aligned, i0, begin * kStep);
    fetch_tile(right_runs, p.right, right_aligned, j0, begin * kStep);
  }
  for (int64_t step = begin; step < end; ++step) {
    __syncthreads();  // the step before has been read
    store_tile(left, left_runs, p.left);
    store_tile(right, right_runs, p.right);
    __syncthreads();
    if (step + 1 < end) {
      fetch_tile(left_runs, p.left, left_aligned, i0, (step + 1) * kStep);
      fetch_tile(right_runs, p.right, right_aligned, j0, (step + 1) * kStep);
    }
#pragma unroll 4
    for (int d = 0; d < kStep; ++d) {
      float a[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) a[c] = left_view.at(i + c, d);
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        if (8 * t >= ranks) break;
        const float b = right_view.at(8 * t + j, d);
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[c][t] = fmaf(a[c], b, sums[c][t]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < 4; ++c)
#pragma unroll
    for (int t = 0; t < 8; ++t)
      if (i0 + i + c < p.I && 8 * t + j < ranks)
        emit(p, split, i0 + i + c, j0 + 8 * t + j, sums[c][t]);
}

// out(i, j) = alpha * (partials[0] + partials[1] + ...), a thread an element.
__global__ void __launch_bounds__(kThreads)
    lora_linear_skinny_sum(const __grid_constant__ SkinnyProduct p) {
  const int64_t count = p.I * p.J, at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= count) return;
  float sum = 0.0f;
  for (int split = 0; split < p.splits; ++split) sum += p.partials[split * count + at];
  store_element(p.out, at / p.J * p.out_i + at % p.J * p.out_j, p.alpha * sum);
}

// --- column sums ---------------------------------------------------------------------------------

// Split z of [M, N]: 32 columns a block, four rows at a time; the four shares added in their order.
__global__ void __launch_bounds__(kThreads)
    lora_linear_column_sum(const Operand matrix, int64_t M, int64_t N, float* partials) {
  __shared__ float shares[4][32];
  const int column = threadIdx.x % 32, lane_row = threadIdx.x / 32;
  const int64_t n = int64_t{blockIdx.x} * 32 + column;
  const int64_t begin = M * blockIdx.y / gridDim.y, end = M * (blockIdx.y + 1) / gridDim.y;
  float sum = 0.0f;
  if (n < N)
#pragma unroll 4
    for (int64_t m = begin + lane_row; m < end; m += 4) sum += load_element(matrix, m * N + n);
  shares[lane_row][column] = sum;
  __syncthreads();
  if (lane_row == 0 && n < N)
    partials[blockIdx.y * N + n] =
        shares[0][column] + shares[1][column] + shares[2][column] + shares[3][column];
}

}  // namespace

int skinny_splits(const SkinnyProduct& p) {
  return split_count(ceil_div(p.I, kTile) * ceil_div(p.J, kTile), ceil_div(p.D, kStep), 4, 64);
}

void launch_skinny(const SkinnyProduct& p, cudaStream_t stream) {
  if (p.I == 0) return;
  if (p.left.matrix.dtype == DType::kFloat32)
    lora_linear_skinny<<<skinny_grid(p), kThreads, 0, stream>>>(p);
  else
    launch_skinny_sm80(p, stream);
  if (p.splits == 1) return;
  const unsigned blocks = static_cast<unsigned>(ceil_div(p.I * p.J, kThreads));
  lora_linear_skinny_sum<<<blocks, kThreads, 0, stream>>>(p);
}

int column_sum_splits(int64_t M, int64_t N) {
  return split_count(ceil_div(N, 32), ceil_div(M, 4), 16, 64);
}

void launch_column_sum(Operand matrix, int64_t M, int64_t N, Operand out, float* partials,
                       cudaStream_t stream) {
  const int splits = column_sum_splits(M, N);
  const dim3 grid(static_cast<unsigned>(ceil_div(N, 32)), splits);
  lora_linear_column_sum<<<grid, kThreads, 0, stream>>>(matrix, M, N, partials);
  SkinnyProduct sum = {};
  sum.I = N, sum.J = 1, sum.alpha = 1.0f, sum.out = out, sum.out_i = 1;
  sum.partials = partials, sum.splits = splits;
  const unsigned blocks = static_cast<unsigned>(ceil_div(N, kThreads));
  lora_linear_skinny_sum<<<blocks, kThreads, 0, stream>>>(sum);
}

}  // namespace halfbyte::cuda
