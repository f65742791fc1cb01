// The fused product on the tensor cores for shapes that lora_linear_sm80.cu does not take: rows
// that are no multiple of 64, blocks of 32 or straddling rows, odd row lengths (every other row
// starts inside a byte), unaligned codes or activations; bf16 and fp16, forward and backward.
//
//   tile      64 rows x 64 columns, steps of 32 along d, four warps of 16 columns each
//   left      [64][32] elements in shared memory, copied one by one with a bound on each
//   weight    [slot][32] elements in shared memory, decoded in runs of 8 along the row of W:
//             forward a run is 8 d of one column, backward 8 columns of one d
//   rows of both are padded to 80 bytes: the eight rows of an ldmatrix lie in different banks
//
// A weight is still read once a row tile as half a byte, decoded once a block and never written to
// memory.
#include "device/ldmatrix.cuh"
#include "lora_linear/warp_tile.cuh"
#include "lora_linear/weight_decode.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kRowTiles = 4, kColTiles = 2;
constexpr int kRows = 16 * kRowTiles, kColumns = kWarps * 8 * kColTiles;
constexpr int kStep = 32;
constexpr int kStride = kStep + 8;  // elements
constexpr int kRun = 8;

template <class Element>
__device__ __forceinline__ void fill_left(Element* left, const Product& p, int64_t m0, int64_t d0) {
  const Element* data = static_cast<const Element*>(p.left.data);
#pragma unroll 4
  for (int part = 0; part < kRows * kStep / kThreads; ++part) {
    const int i = part * kThreads + threadIdx.x;
    const int row = i / kStep, d = i % kStep;
    const bool inside = m0 + row < p.M && d0 + d < p.D;
    left[row * kStride + d] = inside ? data[(m0 + row) * p.D + d0 + d] : from_float<Element>(0.0f);
  }
}

// weight[slot][d]; what lies outside of W is 0.
template <class Element>
__device__ __forceinline__ void fill_weight(Element* weight, const Product& p,
                                            const DecodeTables& tables, int64_t d0, int64_t j0) {
  const int64_t row0 = p.transposed ? d0 : j0, col0 = p.transposed ? j0 : d0;
  const int64_t rows = p.transposed ? p.D : p.J, cols = p.transposed ? p.J : p.D;
  const int runs = (p.transposed ? kColumns : kStep) / kRun;
#pragma unroll 1
  for (int part = 0; part < kColumns * kStep / kRun / kThreads; ++part) {
    const int i = part * kThreads + threadIdx.x;
    const int row = i / runs, col = i % runs * kRun;
    const int64_t left_over = cols - col0 - col;
    float run[kRun] = {};
    if (row0 + row < rows && left_over > 0)
      decode_run(p.weight.bits, tables, (row0 + row) * cols + col0 + col,
                 left_over < kRun ? static_cast<int>(left_over) : kRun, run);
    if (p.transposed) {
#pragma unroll
      for (int c = 0; c < kRun; ++c)
        weight[slot_of_column<kColTiles>(col + c) * kStride + row] = from_float<Element>(run[c]);
    } else {
      *reinterpret_cast<uint4*>(&weight[slot_of_column<kColTiles>(row) * kStride + col]) =
          make_uint4(pack_pair<Element>(run[0], run[1]), pack_pair<Element>(run[2], run[3]),
                     pack_pair<Element>(run[4], run[5]), pack_pair<Element>(run[6], run[7]));
    }
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads, 2)
    lora_linear_any_shape(const __grid_constant__ Product p) {
  // Both tiles; the LoRA part uses the same memory first.
  __shared__ __align__(16) float shared[kLoraFloats<kRowTiles, kColTiles>];
  static_assert(sizeof(shared) >= (kRows + kColumns) * kStride * sizeof(Element), "");
  __shared__ DecodeTables tables;
  Element* left = reinterpret_cast<Element*>(shared);
  Element* weight = left + kRows * kStride;

  // Set-up: this block's tile, this warp's columns, this split's steps.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, split = blockIdx.z;
  const int64_t m0 = int64_t{blockIdx.x} * kRows, j0 = int64_t{blockIdx.y} * kColumns;
  const int64_t warp_j0 = j0 + 8 * kColTiles * warp, steps = (p.D + kStep - 1) / kStep;
  const int64_t begin = steps * split / p.splits, end = steps * (split + 1) / p.splits;
  load_decode_tables<kThreads>(p.weight, tables);
  float sums[kRowTiles][kColTiles][4];
  start_sums(sums, p, split, m0, j0, warp_j0, shared);

  // ldmatrix rows of this lane: 16 rows of left by 2 halves of d; 2 mma tiles by 2 halves of d.
  const uint32_t left_row = shared_address(left + lane % 16 * kStride + lane / 16 * 8);
  const uint32_t weight_row = shared_address(
      weight + (8 * kColTiles * warp + lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8);
  for (int64_t step = begin; step < end; ++step) {
    __syncthreads();  // the tables are there; the step before has been read
    fill_left(left, p, m0, step * kStep);
    fill_weight(weight, p, tables, step * kStep, j0);
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kStep; s += 16) {
      uint32_t b[4];
      ldmatrix_x4(b, weight_row + s * sizeof(Element));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t a[4];
        ldmatrix_x4(a, left_row + (i * 16 * kStride + s) * sizeof(Element));
#pragma unroll
        for (int t = 0; t < kColTiles; ++t)
          mma_m16n8k16<Element>(sums[i][t], a, b[2 * t], b[2 * t + 1]);
      }
    }
  }
  store_tile<Element>(sums, p, split, m0, warp_j0);
}

}  // namespace

int any_shape_splits(const Product& p) {
  return split_count(tile_count(p, kRows, kColumns), ceil_div(p.D, kStep), 8, 16);
}

void launch_any_shape(const Product& p, cudaStream_t stream) {
  const dim3 grid = tile_grid(p, kRows, kColumns);
  if (p.left.dtype == DType::kBFloat16)
    lora_linear_any_shape<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(p);
  else
    lora_linear_any_shape<__half><<<grid, kThreads, 0, stream>>>(p);
}

}  // namespace halfbyte::cuda
