// The skinny products T, U, dA and dB (lora_linear_lora.cu) for 16-bit activations, on the tensor
// cores (compute capability 8.0 and later): out(i, j) = alpha * sum_d left(i, d) right(j, d).
//
//   tile      64 i x 64 j, steps of 32 along d; four warps of 16 i each
//   left      16-bit elements as they lie in memory, in stages filled by cp.async (one by one where
//             rows do not start at 16 bytes): T and U read rows of d, [64][32]; dA and dB rows of
//             i, [32][64], which ldmatrix transposes. Either way lane (g, q) gets pairs (2 q,
//             2 q + 1) of eight d, of i = g and g + 8
//   right     fp32 rounded to 11 bits, [64 j][32 d + 8]: the pairs that half a warp reads lie in
//             different banks
//   products  tf32: such a pair is columns q and q + 4 of the operand, since the order of a sum
//             over d is free. Exact for x and dY; A, B, T and U keep 11 significant bits and the
//             range of fp32 (an fp16 U would lose small gradients)
//   dropout   in registers: a dropped element of x becomes 0, so it may be anything; 1 / (1 - p) is
//             part of alpha
//
// Why it is fast: left is copied, never converted on the way to shared memory, and a pair costs two
// instructions there; work on right and on the sums ends with the rank.
#include "device/cp_async.cuh"
#include "device/ldmatrix.cuh"
#include "device/mma.cuh"
#include "lora_linear/skinny_operand.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = kSkinnyTile, kStep = kSkinnyStep;
constexpr int kStages = 3;
constexpr int kChunk = 8;                                   // elements of a copy
constexpr int kChunks = kTile * kStep / kChunk / kThreads;  // a thread's
constexpr int kRuns = kTile * kStep / kRun / kThreads;      // of right, a thread's
constexpr int kRanks = kTile / kRuns;                       // that all threads' run r spans
constexpr int kRightStride = kStep + 8;

constexpr int kStageElements = kTile * kStep;

constexpr int kElementBytes = 2;

// --- left ----------------------------------------------------------------------------------------

// Left as it lies in a stage: rows of d or, kColumns, of i; 2 or 1 of them in the 128 bytes that
// all banks hold. A row's 16-byte chunks are permuted by its line, so that neither a copy nor an
// ldmatrix meets a bank twice.
template <bool kColumns>
struct LeftTile {
  static constexpr int kRowChunks = (kColumns ? kTile : kStep) / kChunk;
  static constexpr int kRowBytes = kRowChunks * 16;
  static __device__ __forceinline__ uint32_t place(int row, int chunk) {
    const int line = row * kRowChunks / 8;
    return row * kRowBytes + 16 * (chunk ^ line % kRowChunks);
  }
};

// What a thread copies to a stage, from the first step on: chunks of rows kRowsApart apart.
template <bool kColumns>
struct LeftCopies {
  using Tile = LeftTile<kColumns>;
  static constexpr int kRowsApart = kThreads / Tile::kRowChunks;
  const SkinnyOperand& left;
  const bool aligned;
  const uint16_t* source;
  int64_t row, col;  // of its first element
  uint32_t target;

  __device__ __forceinline__ LeftCopies(const SkinnyOperand& left, int64_t i0, int64_t d0)
      : left(left),
        aligned(left.cols % kChunk == 0 &&
                reinterpret_cast<uintptr_t>(left.matrix.data) % 16 == 0) {
    const int tile_row = threadIdx.x / Tile::kRowChunks, chunk = threadIdx.x % Tile::kRowChunks;
    row = (kColumns ? d0 : i0) + tile_row;
    col = (kColumns ? i0 : d0) + chunk * kChunk;
    source = static_cast<const uint16_t*>(left.matrix.data) + row * left.cols + col;
    target = Tile::place(tile_row, chunk);
  }

  // The next step.
  __device__ __forceinline__ void fill(uint16_t* stage) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int64_t inside = row + c * kRowsApart < left.rows ? left.cols - col : 0;
      const uint16_t* from = source + c * kRowsApart * left.cols;
      uint16_t* to = stage + (target + c * kRowsApart * Tile::kRowBytes) / kElementBytes;
      if (aligned) {
        cp_async_16(shared_address(to), from, inside > 0);
      } else {
        for (int e = 0; e < kChunk; ++e) to[e] = e < inside ? from[e] : 0;
      }
    }
    (kColumns ? row : col) += kStep;
    source += kColumns ? kStep * left.cols : kStep;
  }
};

// Where this lane's row of an ldmatrix lies in a stage: of 16 d, 16 h .., and the warp's 16 i.
template <bool kColumns>
__device__ __forceinline__ uint32_t ldmatrix_place(int h) {
  using Tile = LeftTile<kColumns>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return kColumns ? Tile::place(16 * h + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2)
                  : Tile::place(16 * warp + lane % 16, 2 * h + lane / 16);
}

// Pairs of neighbouring d, i = i0 + g + 8 (r % 2), d = 8 (r / 2) + 2 q.
template <bool kColumns>
__device__ __forceinline__ void load_left(uint32_t (&pairs)[4], uint32_t address) {
  if constexpr (kColumns)
    ldmatrix_x4_transposed(pairs, address);
  else
    ldmatrix_x4(pairs, address);
}

// The same pairs with dropped elements replaced by 0. row_keys: of rows i0 + g and i0 + g + 8 where
// the rows of left are i.
template <bool kColumns>
__device__ __forceinline__ void drop_left(uint32_t (&pairs)[4], const Dropout& dropout,
                                          const uint64_t (&row_keys)[2], int64_t i0, int64_t d0) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t i = i0 + threadIdx.x / 32 * 16 + g + r % 2 * 8, d = d0 + r / 2 * 8 + 2 * q;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint64_t key = kColumns ? dropout_row_key(dropout, d + e) : row_keys[r % 2];
      if (!dropout_keeps(dropout, key, kColumns ? i : d + e)) pairs[r] &= e ? 0xFFFF : 0xFFFF0000;
    }
  }
}

template <class Element>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000));
}
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// --- right ---------------------------------------------------------------------------------------

// What a thread reads of right, from the first step on: run r has four d of one j where the rows of
// right are j, four j of one d where they are d. All threads' run r lies in ranks kRanks r ..
// kRanks (r + 1) - 1, and so `ranks` ends the work.
struct RightRuns {
  const SkinnyOperand& right;
  const int ranks;
  const bool aligned;
  int64_t row, col, index;  // of its first element
  int target;               // in the tile, [j][d]
  float4 runs[kRuns];

  __device__ __forceinline__ RightRuns(const SkinnyOperand& right, int ranks, int64_t j0,
                                       int64_t d0)
      : right(right), ranks(ranks), aligned(runs_are_aligned(right)) {
    const int thread = threadIdx.x;
    const int j = right.reduce_rows ? thread / kStep * kRun : thread / (kStep / kRun);
    const int d = right.reduce_rows ? thread % kStep : thread % (kStep / kRun) * kRun;
    row = right.reduce_rows ? d0 + d : j0 + j;
    col = right.reduce_rows ? j0 + j : d0 + d;
    index = row * right.cols + col;
    target = j * kRightStride + d;
  }

  // The next step.
  __device__ __forceinline__ void fetch() {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      if (kRanks * r >= ranks) break;
      const int64_t rows_on = right.reduce_rows ? 0 : kRanks * r, on = kRanks * r - rows_on;
      const int64_t inside = row + rows_on < right.rows ? right.cols - col - on : 0;
      runs[r] = load_run(right.matrix, aligned, index + rows_on * right.cols + on, inside);
    }
    (right.reduce_rows ? row : col) += kStep;
    index += right.reduce_rows ? kStep * right.cols : kStep;
  }

  __device__ __forceinline__ void store(float* tile) const {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      if (kRanks * r >= ranks) break;
      float* to = tile + target + kRanks * r * kRightStride;
      const float4 v = make_float4(round_to_tf32(runs[r].x), round_to_tf32(runs[r].y),
                                   round_to_tf32(runs[r].z), round_to_tf32(runs[r].w));
      if (right.reduce_rows) {
        to[0] = v.x;
        to[kRightStride] = v.y;
        to[2 * kRightStride] = v.z;
        to[3 * kRightStride] = v.w;
      } else {
        *reinterpret_cast<float4*>(to) = v;
      }
    }
  }
};

// --- products ------------------------------------------------------------------------------------

// sums[t] += the products of 16 d, 16 h .. of the step.
template <class Element>
__device__ __forceinline__ void multiply(float (&sums)[8][4], const uint32_t (&pairs)[4],
                                         const float* right, int ranks, int h) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  uint32_t a[2][4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float2 pair = unpack_pair<Element>(pairs[r]);
    a[r / 2][r % 2] = __float_as_uint(pair.x);
    a[r / 2][r % 2 + 2] = __float_as_uint(pair.y);
  }
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    if (8 * t >= ranks) break;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const float2 b = *reinterpret_cast<const float2*>(right + (8 * t + g) * kRightStride +
                                                        16 * h + 8 * s + 2 * q);
      mma_m16n8k8_tf32(sums[t], a[s], __float_as_uint(b.x), __float_as_uint(b.y));
    }
  }
}

__device__ __forceinline__ void store_sums(const float (&sums)[8][4], const SkinnyProduct& p,
                                           int split, int ranks, int64_t i0, int64_t j0) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    if (8 * t >= ranks) break;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t i = i0 + threadIdx.x / 32 * 16 + g + c / 2 * 8;
      const int j = 8 * t + 2 * q + c % 2;
      if (i < p.I && j < ranks) emit(p, split, i, j0 + j, sums[t][c]);
    }
  }
}

template <class Element, bool kColumns>
__global__ void __launch_bounds__(kThreads, 4)
    lora_linear_skinny_mma(const __grid_constant__ SkinnyProduct p) {
  __shared__ __align__(16) uint16_t left[kStages][kStageElements];
  __shared__ __align__(16) float right[kTile * kRightStride];

  // Set-up: this block's tile and this split's steps.
  const int split = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t i0 = int64_t{blockIdx.x} * kTile, j0 = int64_t{blockIdx.y} * kTile;
  const int64_t steps = (p.D + kStep - 1) / kStep;
  const int64_t begin = steps * split / p.splits, end = steps * (split + 1) / p.splits;
  const int ranks = p.J - j0 < kTile ? static_cast<int>(p.J - j0) : kTile;
  LeftCopies<kColumns> left_copies(p.left, i0, begin * kStep);
  RightRuns right_runs(p.right, ranks, j0, begin * kStep);
  uint32_t places[kStep / 16];
#pragma unroll
  for (int h = 0; h < kStep / 16; ++h) places[h] = ldmatrix_place<kColumns>(h);
  const Dropout& dropout = p.left.dropout;
  uint64_t row_keys[2] = {};
  if (!kColumns && dropout.threshold) {
    row_keys[0] = dropout_row_key(dropout, i0 + 16 * warp + lane / 4);
    row_keys[1] = dropout_row_key(dropout, i0 + 16 * warp + lane / 4 + 8);
  }

  float sums[8][4] = {};
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (begin + s < end) left_copies.fill(left[s]);
    cp_async_commit();
  }
  if (begin < end) right_runs.fetch();
  int stage = 0, free_stage = kStages - 1;
  for (int64_t step = begin; step < end; ++step) {
    __syncthreads();  // the step before has been read
    right_runs.store(right);
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step is there
    if (step + kStages - 1 < end) left_copies.fill(left[free_stage]);
    cp_async_commit();
    if (step + 1 < end) right_runs.fetch();
    const uint32_t now = shared_address(left[stage]);
#pragma unroll
    for (int h = 0; h < kStep / 16; ++h) {
      uint32_t pairs[4];
      load_left<kColumns>(pairs, now + places[h]);
      if (dropout.threshold)
        drop_left<kColumns>(pairs, dropout, row_keys, i0, step * kStep + 16 * h);
      multiply<Element>(sums, pairs, right, ranks, h);
    }
    free_stage = stage;
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  store_sums(sums, p, split, ranks, i0, j0);
}

template <class Element>
void launch(const SkinnyProduct& p, cudaStream_t stream) {
  const dim3 grid = skinny_grid(p);
  if (p.left.reduce_rows)
    lora_linear_skinny_mma<Element, true><<<grid, kThreads, 0, stream>>>(p);
  else
    lora_linear_skinny_mma<Element, false><<<grid, kThreads, 0, stream>>>(p);
}

}  // namespace

void launch_skinny_sm80(const SkinnyProduct& p, cudaStream_t stream) {
  if (p.left.matrix.dtype == DType::kBFloat16)
    launch<__nv_bfloat16>(p, stream);
  else
    launch<__half>(p, stream);
}

}  // namespace halfbyte::cuda
