// What the tensor core kernels share: the sums of a warp, the LoRA part, and the way out.
//
// A block is four warps side by side; each owns all 16 kRowTiles rows of the block's tile and its
// own 8 kColTiles columns, so that no weight is decoded twice in a block:
//
//              warp 0          warp 1          warp 2          warp 3
//   row 0   +---------------+---------------+---------------+---------------+
//     ..    | 8 kColTiles   |               |               |               |
//   row 16 kRowTiles - 1 ---+---------------+---------------+---------------+
//
// Which column an mma column stands for is free; here column c of mma tile t is the warp's column
// kColTiles * c + t. Lane 4 g + q then holds 2 kColTiles NEIGHBOURING columns of its rows, from
// kColTiles * 2 q on, and writes them with one store. A slot, 8 t + c, is a column's place in
// this order.
#pragma once

#include "device/mma.cuh"
#include "lora_linear/operand.cuh"

namespace halfbyte::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// Rows of 16 ranks and 4 floats of padding: a lane's address 20 g + q meets no other's bank.
constexpr int kRankStep = 16;
constexpr int kRankStride = kRankStep + 4;

template <int kRowTiles, int kColTiles>
constexpr int kLoraFloats = (16 * kRowTiles + kWarps * 8 * kColTiles) * kRankStride;

template <int kColTiles>
__device__ __forceinline__ int slot_of_column(int column) {
  const int inside = column % (8 * kColTiles);
  return column - inside + inside % kColTiles * 8 + inside / kColTiles;
}

// sums += mask * scale * t L, by tf32 products: 11 significant bits of each factor, fp32's range.
// `shared` holds kLoraFloats; a barrier must follow before it is used for something else.
template <int kRowTiles, int kColTiles>
__device__ __forceinline__ void add_lora(float (&sums)[kRowTiles][kColTiles][4], const Product& p,
                                         int64_t m0, int64_t j0, float* shared) {
  constexpr int kRows = 16 * kRowTiles, kColumns = kWarps * 8 * kColTiles;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, warp = threadIdx.x / 32;
  float* left = shared;                         // [kRows][kRankStride]
  float* right = shared + kRows * kRankStride;  // [slot][kRankStride]
  for (int64_t r0 = 0; r0 < p.R; r0 += kRankStep) {
    __syncthreads();  // the step before has been read
#pragma unroll 4
    for (int part = 0; part < kRows * kRankStep / kThreads; ++part) {
      const int i = part * kThreads + threadIdx.x;
      const int row = i / kRankStep, r = i % kRankStep;
      const bool inside = m0 + row < p.M && r0 + r < p.R;
      const float t = inside ? p.lora_left[(m0 + row) * p.R + r0 + r] : 0.0f;
      left[row * kRankStride + r] = round_to_tf32(t);
    }
#pragma unroll 4
    for (int part = 0; part < kColumns * kRankStep / kThreads; ++part) {
      const int i = part * kThreads + threadIdx.x;
      const int column = p.transposed ? i % kColumns : i / kRankStep;
      const int r = p.transposed ? i / kColumns : i % kRankStep;
      const int64_t index = p.transposed ? (r0 + r) * p.J + j0 + column  //
                                         : (j0 + column) * p.R + r0 + r;
      const bool inside = j0 + column < p.J && r0 + r < p.R;
      const float l = inside ? load_element(p.lora_right, index) * p.lora_scale : 0.0f;
      right[slot_of_column<kColTiles>(column) * kRankStride + r] = round_to_tf32(l);
    }
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kRankStep; step += 8) {
      uint32_t b[kColTiles][2];
#pragma unroll
      for (int t = 0; t < kColTiles; ++t) {
        const float* at = right + ((warp * kColTiles + t) * 8 + g) * kRankStride + step + q;
        b[t][0] = __float_as_uint(at[0]);
        b[t][1] = __float_as_uint(at[4]);
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const float* at = left + (16 * i + g) * kRankStride + step + q;
        const uint32_t a[4] = {__float_as_uint(at[0]), __float_as_uint(at[8 * kRankStride]),
                               __float_as_uint(at[4]), __float_as_uint(at[8 * kRankStride + 4])};
#pragma unroll
        for (int t = 0; t < kColTiles; ++t) mma_m16n8k8_tf32(sums[i][t], a, b[t][0], b[t][1]);
      }
    }
  }
}

// The mask of the LoRA part, before anything else is added.
template <int kRowTiles, int kColTiles>
__device__ __forceinline__ void drop_lora(float (&sums)[kRowTiles][kColTiles][4],
                                          const Dropout& dropout, int64_t m0, int64_t warp_j0) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t key = dropout_row_key(dropout, m0 + 16 * i + 8 * half + g);
#pragma unroll
      for (int t = 0; t < kColTiles; ++t) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& sum = sums[i][t][2 * half + c];
          const bool kept = dropout_keeps(dropout, key, warp_j0 + kColTiles * (2 * q + c) + t);
          sum = kept ? sum * dropout.scale : 0.0f;
        }
      }
    }
  }
}

// One row's 2 kColTiles neighbouring sums as elements, in one store where they are all inside.
template <class Element, int kColumns>
__device__ __forceinline__ void store_run(const Product& p, int64_t m, int64_t j,
                                          const float (&run)[kColumns]) {
  Element* out = static_cast<Element*>(p.out.data) + m * p.J + j;
  constexpr uintptr_t kBytes = kColumns * sizeof(Element);
  if (j + kColumns <= p.J && reinterpret_cast<uintptr_t>(out) % kBytes == 0) {
    uint32_t words[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i)
      words[i] = pack_pair<Element>(run[2 * i], run[2 * i + 1]);
    if constexpr (kColumns == 8)
      *reinterpret_cast<uint4*>(out) = make_uint4(words[0], words[1], words[2], words[3]);
    else
      *reinterpret_cast<uint2*>(out) = make_uint2(words[0], words[1]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i)
    if (j + i < p.J) out[i] = from_float<Element>(run[i]);
}

// The same as fp32, into this split's share of the partial sums.
template <int kColumns>
__device__ __forceinline__ void store_partial(const Product& p, int split, int64_t m, int64_t j,
                                              const float (&run)[kColumns]) {
  float* out = p.partials + (split * p.M + m) * p.J + j;
  if (j + kColumns <= p.J && p.J % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kColumns; i += 4)
      *reinterpret_cast<float4*>(out + i) = make_float4(run[i], run[i + 1], run[i + 2], run[i + 3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i)
    if (j + i < p.J) out[i] = run[i];
}

template <class Element, int kRowTiles, int kColTiles>
__device__ __forceinline__ void store_tile(const float (&sums)[kRowTiles][kColTiles][4],
                                           const Product& p, int split, int64_t m0,
                                           int64_t warp_j0) {
  constexpr int kColumns = 2 * kColTiles;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int64_t j = warp_j0 + kColumns * q;
  float bias[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i)
    bias[i] = p.bias.data && j + i < p.J ? load_element(p.bias, j + i) : 0.0f;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t m = m0 + 16 * i + 8 * half + g;
      float run[kColumns];
#pragma unroll
      for (int t = 0; t < kColTiles; ++t) {
        run[t] = sums[i][t][2 * half];
        run[kColTiles + t] = sums[i][t][2 * half + 1];
      }
      if (m >= p.M) continue;
      if (p.splits > 1) {
        store_partial(p, split, m, j, run);
        continue;
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) run[c] += bias[c];
      store_run<Element>(p, m, j, run);
    }
  }
}

// Sums start as the LoRA part, in the first split; the others start at zero. A barrier must follow
// before `shared` is used again.
template <int kRowTiles, int kColTiles>
__device__ __forceinline__ void start_sums(float (&sums)[kRowTiles][kColTiles][4], const Product& p,
                                           int split, int64_t m0, int64_t j0, int64_t warp_j0,
                                           float* shared) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int t = 0; t < kColTiles; ++t)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[i][t][c] = 0.0f;
  if (split != 0 || p.R == 0) return;
  add_lora(sums, p, m0, j0, shared);
  if (p.dropout.threshold) drop_lora(sums, p.dropout, m0, warp_j0);
}

}  // namespace halfbyte::cuda
