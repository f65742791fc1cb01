// The products of the LoRA branch that read no packed weight, and column sums:
//
//   T  [M, R] = drop(x) A^T       sum over k        dA [R, K] = U^T drop(x)      sum over m
//   U  [M, R] = s dY B            sum over n        dB [N, R] = s dY^T T         sum over m
//   dbias [N] = sum_m dY
//
// All four are out(i, j) = alpha * sum_d left(i, d) right(j, d) with j < R, the rank, and `left`
// an activation: one kernel, which reads the activation once for 64 ranks.
//
//   tile      64 i x 64 j, steps of 32 along d; four warps of 16 i each
//   shared    a matrix whose columns are d lies as [64][32 + 4], one whose rows are d as [32][64 +
//   8]:
//             each is filled along its rows in memory, four elements at a time, and in both the
//             lanes (g, q) of an mma, i = g and d = q, meet 32 different banks
//   products  tf32 for 16-bit activations: exact for x and dY, 11 significant bits of A, B, T and
//             U, with the range of fp32 (an fp16 U would lose small gradients). fp32 FMA for fp32.
//   dropout   a dropped element of x is replaced by 0, so it may be anything; 1 / (1 - p) is part
//             of alpha
//
// The next step's elements are read while this step's are multiplied. d is split over blocks where
// the tiles alone would not fill a device; a second pass adds the parts in their order.
#include "device/mma.cuh"
#include "lora_linear/operand.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 64;
constexpr int kStep = 32;
constexpr int kRun = 4;
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

__device__ __forceinline__ float4 load_whole_run(const Operand& matrix, int64_t index) {
  if (matrix.dtype == DType::kFloat32)
    return *reinterpret_cast<const float4*>(static_cast<const float*>(matrix.data) + index);
  const uint2 raw =
      *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(matrix.data) + index);
  const uint32_t words[4] = {raw.x & 0xFFFF, raw.x >> 16, raw.y & 0xFFFF, raw.y >> 16};
  float out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    out[i] = matrix.dtype == DType::kBFloat16
                 ? __uint_as_float(words[i] << 16)
                 : __half2float(__ushort_as_half(static_cast<unsigned short>(words[i])));
  return make_float4(out[0], out[1], out[2], out[3]);
}

// Four elements of a row; 0 outside of the matrix and where dropped.
__device__ __forceinline__ float4 load_run(const SkinnyOperand& operand, bool aligned, int64_t row,
                                           int64_t col) {
  float4 run = make_float4(0, 0, 0, 0);
  const int64_t inside = row < operand.rows ? operand.cols - col : 0,
                index = row * operand.cols + col;
  if (inside <= 0) return run;
  if (aligned && inside >= kRun) {
    run = load_whole_run(operand.matrix, index);
  } else {
    run.x = load_element(operand.matrix, index);
    if (inside > 1) run.y = load_element(operand.matrix, index + 1);
    if (inside > 2) run.z = load_element(operand.matrix, index + 2);
    if (inside > 3) run.w = load_element(operand.matrix, index + 3);
  }
  if (operand.dropout.threshold) {
    const uint64_t key = dropout_row_key(operand.dropout, row);
    if (!dropout_keeps(operand.dropout, key, col)) run.x = 0;
    if (!dropout_keeps(operand.dropout, key, col + 1)) run.y = 0;
    if (!dropout_keeps(operand.dropout, key, col + 2)) run.z = 0;
    if (!dropout_keeps(operand.dropout, key, col + 3)) run.w = 0;
  }
  return run;
}

// Whether every run that lies inside of the matrix is one aligned load.
__device__ __forceinline__ bool runs_are_aligned(const SkinnyOperand& operand) {
  const uintptr_t bytes = operand.matrix.dtype == DType::kFloat32 ? 16 : 8;
  return operand.cols % kRun == 0 && reinterpret_cast<uintptr_t>(operand.matrix.data) % bytes == 0;
}

__device__ __forceinline__ void fetch_tile(float4 (&runs)[kRuns], const SkinnyOperand& operand,
                                           bool aligned, int64_t first, int64_t d0) {
  const int64_t row0 = operand.reduce_rows ? d0 : first, col0 = operand.reduce_rows ? first : d0;
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    const Position at = run_position(operand, run);
    runs[run] = load_run(operand, aligned, row0 + at.row, col0 + at.col);
  }
}

template <bool kExact>
__device__ __forceinline__ void store_tile(float* tile, const float4 (&runs)[kRuns],
                                           const SkinnyOperand& operand) {
  const int stride = operand.reduce_rows ? kStrideByStep : kStrideByRow;
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    const Position at = run_position(operand, run);
    float4 v = runs[run];
    if (!kExact)
      v = make_float4(round_to_tf32(v.x), round_to_tf32(v.y), round_to_tf32(v.z),
                      round_to_tf32(v.w));
    *reinterpret_cast<float4*>(tile + at.row * stride + at.col) = v;
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

// A warp's 16 x 64 sums, 32 a lane, and which of them is which.
struct TensorSums {
  float sums[8][4] = {};

  __device__ __forceinline__ void add(const TileView& left, const TileView& right, int ranks) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, i0 = threadIdx.x / 32 * 16;
#pragma unroll
    for (int d = 0; d < kStep; d += 8) {
      const uint32_t a[4] = {__float_as_uint(left.at(i0 + g, d + q)),
                             __float_as_uint(left.at(i0 + g + 8, d + q)),
                             __float_as_uint(left.at(i0 + g, d + q + 4)),
                             __float_as_uint(left.at(i0 + g + 8, d + q + 4))};
#pragma unroll
      for (int t = 0; t < 8; ++t)
        if (8 * t < ranks)
          mma_m16n8k8_tf32(sums[t], a, __float_as_uint(right.at(8 * t + g, d + q)),
                           __float_as_uint(right.at(8 * t + g, d + q + 4)));
    }
  }
  template <class Store>
  __device__ __forceinline__ void for_each(Store store) const {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, i0 = threadIdx.x / 32 * 16;
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
      for (int c = 0; c < 4; ++c) store(i0 + g + c / 2 * 8, 8 * t + 2 * q + c % 2, sums[t][c]);
  }
};

struct ExactSums {
  float sums[4][8] = {};

  __device__ __forceinline__ void add(const TileView& left, const TileView& right, int ranks) {
    const int lane = threadIdx.x % 32, i0 = threadIdx.x / 32 * 16 + lane / 8 * 4, j0 = lane % 8;
#pragma unroll 4
    for (int d = 0; d < kStep; ++d) {
      float a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = left.at(i0 + i, d);
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        if (8 * t >= ranks) break;
        const float b = right.at(8 * t + j0, d);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i][t] = fmaf(a[i], b, sums[i][t]);
      }
    }
  }
  template <class Store>
  __device__ __forceinline__ void for_each(Store store) const {
    const int lane = threadIdx.x % 32, i0 = threadIdx.x / 32 * 16 + lane / 8 * 4, j0 = lane % 8;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int t = 0; t < 8; ++t) store(i0 + i, 8 * t + j0, sums[i][t]);
  }
};

template <class Sums, bool kExact>
__global__ void __launch_bounds__(kThreads, 3)
    lora_linear_skinny(const __grid_constant__ SkinnyProduct p) {
  __shared__ __align__(16) float left[kTileFloats];
  __shared__ __align__(16) float right[kTileFloats];

  // Set-up: this block's tile and this split's steps.
  const int split = blockIdx.z;
  const int64_t i0 = int64_t{blockIdx.x} * kTile, j0 = int64_t{blockIdx.y} * kTile;
  const int64_t steps = (p.D + kStep - 1) / kStep;
  const int64_t begin = steps * split / p.splits, end = steps * (split + 1) / p.splits;
  const int ranks = p.J - j0 < kTile ? static_cast<int>(p.J - j0) : kTile;
  const bool left_aligned = runs_are_aligned(p.left), right_aligned = runs_are_aligned(p.right);
  Sums sums;

  float4 left_runs[kRuns], right_runs[kRuns];
  if (begin < end) {
    fetch_tile(left_runs, p.left, left_aligned, i0, begin * kStep);
    fetch_tile(right_runs, p.right, right_aligned, j0, begin * kStep);
  }
  for (int64_t step = begin; step < end; ++step) {
    __syncthreads();  // the step before has been read
    store_tile<kExact>(left, left_runs, p.left);
    store_tile<kExact>(right, right_runs, p.right);
    __syncthreads();
    if (step + 1 < end) {
      fetch_tile(left_runs, p.left, left_aligned, i0, (step + 1) * kStep);
      fetch_tile(right_runs, p.right, right_aligned, j0, (step + 1) * kStep);
    }
    sums.add(view(left, p.left), view(right, p.right), ranks);
  }
  sums.for_each([&](int i, int j, float sum) {
    if (i0 + i >= p.I || j >= ranks) return;
    if (p.splits > 1)
      p.partials[(split * p.I + i0 + i) * p.J + j0 + j] = sum;
    else
      store_element(p.out, (i0 + i) * p.out_i + (j0 + j) * p.out_j, p.alpha * sum);
  });
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
  const dim3 grid(static_cast<unsigned>(ceil_div(p.I, kTile)),
                  static_cast<unsigned>(ceil_div(p.J, kTile)), p.splits);
  if (p.exact)
    lora_linear_skinny<ExactSums, true><<<grid, kThreads, 0, stream>>>(p);
  else
    lora_linear_skinny<TensorSums, false><<<grid, kThreads, 0, stream>>>(p);
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
