// y = x W^T for 1 to 16 rows of bf16 or fp16 activations: as fast as the packed bytes can be read.
//
//   block     16 rows of W, eight warps; warp w sums chunks w, w + 8, .. of 128 elements of k
//   mma       W is the 16-row operand and x the 8-column one, so that no product is wasted on the
//             16 - M rows that are not there: out^T[n, m] = sum_k W[n, k] x[m, k]
//   chunk     lane 4 g + q loads 16 bytes of row g and 16 of row g + 8:
//
//       row g   | q = 0: k 0..31 | q = 1: 32..63 | q = 2: 64..95 | q = 3: 96..127 |
//                 \____ block 0, one scale _____/  \_____ block 1, another ______/
//
//             q = 0, 1 give their upper halves of block 0 to lanes q + 2 and receive lower halves
//             of block 1, so that all four lanes of a row hold 16 elements of each block; with
//             them go the same 16 elements of x (the order of a sum over k is free)
//   decode    a byte is an index into 256 pairs of levels, in 32 copies, one a bank: one
//             conflict-free word of shared memory for two weights
//
// The sum over 64 elements of a block is scaled once, in fp32. Levels are rounded to the type of
// x, so a weight carries the same relative error as one that is decoded and then rounded.
//
// Why it is fast: every byte is read once, 64 neighbouring bytes of a row by four lanes, two chunks
// ahead of their use; two weights cost a shift, a mask and a load; the tensor cores do the rest.
//
// Sums: fp32 within a warp, then over the eight warps in their order, then over the splits.
// Invariants: K % 64 == 0, block size >= 64, x and codes on 16-byte boundaries.
#include "device/mma.cuh"
#include "lora_linear/operand.cuh"
#include "lora_linear/weight_decode.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;  // of W, a block
constexpr int kBlock = 64;
constexpr int kChunk = 2 * kBlock;  // along k

// pairs[byte][bank]: the levels of both nibbles, the first in the lower half.
template <class Element>
__device__ __forceinline__ void load_pairs(const DecodeTables& tables, uint32_t (&pairs)[256][32]) {
  for (int byte = threadIdx.x / 32; byte < 256; byte += kWarps)
    pairs[byte][threadIdx.x % 32] =
        pack_pair<Element>(tables.levels[byte >> 4], tables.levels[byte & 15]);
}

__device__ __forceinline__ uint32_t pair_at(const uint32_t (&pairs)[256][32], uint32_t word,
                                            int byte) {
  const uint32_t offset = byte == 0 ? word << 7 : word >> (8 * byte - 7);
  const char* base = reinterpret_cast<const char*>(pairs);
  const uint32_t lane_bytes = 4 * (threadIdx.x % 32);
  return *reinterpret_cast<const uint32_t*>(base + ((offset & 0x7F80) | lane_bytes));
}

// What a lane reads of a chunk: rows g and g + 8.
struct Chunk {
  uint4 codes[2];
  RawScale scales[2][2];  // [row][block]
};

__device__ __forceinline__ Chunk fetch_chunk(const Product& p, const int64_t (&rows)[2],
                                             int64_t k0) {
  const int q = threadIdx.x % 4;
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t element = rows[i] * p.D + k0;
    chunk.codes[i] = make_uint4(0, 0, 0, 0);
    if (k0 + 32 * q < p.D)
      chunk.codes[i] =
          __ldg(reinterpret_cast<const uint4*>(p.weight.bits.packed + element / 2 + 16 * q));
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int64_t first = k0 + b * kBlock < p.D ? element + b * kBlock : element;
      chunk.scales[i][b] = fetch_scale(p.weight.bits, first >> p.weight.bits.block_shift);
    }
  }
  return chunk;
}

// halves[b]: this lane's 16 elements of block b.
__device__ __forceinline__ void exchange_halves(uint2 (&halves)[2], uint4 codes) {
  const bool low = threadIdx.x % 4 < 2;
  const uint2 kept = low ? make_uint2(codes.x, codes.y) : make_uint2(codes.z, codes.w);
  const uint2 sent = low ? make_uint2(codes.z, codes.w) : make_uint2(codes.x, codes.y);
  const uint2 received =
      make_uint2(__shfl_xor_sync(~0u, sent.x, 2), __shfl_xor_sync(~0u, sent.y, 2));
  halves[0] = low ? kept : received;
  halves[1] = low ? received : kept;
}

// sums[i]: out[n, 8 i + m] of the 16 rows of W.
template <class Element, int kTokenTiles>
__device__ __forceinline__ void add_chunk(float (&sums)[kTokenTiles][4], const Chunk& chunk,
                                          const Product& p, int64_t k0,
                                          const uint32_t (&pairs)[256][32],
                                          const DecodeTables& tables) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  uint2 halves[2][2];  // [row][block]
#pragma unroll
  for (int i = 0; i < 2; ++i) exchange_halves(halves[i], chunk.codes[i]);
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const int64_t k = k0 + b * kBlock + q % 2 * 32 + q / 2 * 16;
    uint4 x[kTokenTiles][2];
    float block_sums[kTokenTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      const int64_t m = 8 * i + g;
      const bool inside = m < p.M && k < p.D;
      const uint4* source =
          reinterpret_cast<const uint4*>(static_cast<const Element*>(p.left.data) + m * p.D + k);
#pragma unroll
      for (int j = 0; j < 2; ++j) x[i][j] = inside ? __ldg(source + j) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t low = s < 2 ? halves[0][b].x : halves[0][b].y;
      const uint32_t high = s < 2 ? halves[1][b].x : halves[1][b].y;
      const int byte = 2 * (s % 2);
      const uint32_t w[4] = {pair_at(pairs, low, byte), pair_at(pairs, high, byte),
                             pair_at(pairs, low, byte + 1), pair_at(pairs, high, byte + 1)};
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
        const uint4 v = x[i][s / 2];
        mma_m16n8k16<Element>(block_sums[i], w, s % 2 ? v.z : v.x, s % 2 ? v.w : v.y);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale = scale_value(p.weight.bits, tables, chunk.scales[i][b]);
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        sums[t][2 * i] = fmaf(scale, block_sums[t][2 * i], sums[t][2 * i]);
        sums[t][2 * i + 1] = fmaf(scale, block_sums[t][2 * i + 1], sums[t][2 * i + 1]);
      }
    }
  }
}

// scale * sum_r T[m, r] B[n, r]
__device__ __forceinline__ float lora_term(const Product& p, int64_t m, int64_t n) {
  float sum = 0.0f;
  for (int64_t r = 0; r < p.R; ++r)
    sum = fmaf(p.lora_left[m * p.R + r], load_element(p.lora_right, n * p.R + r), sum);
  return p.lora_scale * sum;
}

template <class Element, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 2)
    lora_linear_few_rows(const __grid_constant__ Product p) {
  __shared__ __align__(16) uint32_t pairs[256][32];
  __shared__ DecodeTables tables;

  // Set-up: this block's rows of W, this split's chunks.
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, warp = threadIdx.x / 32;
  const int split = blockIdx.y;
  const int64_t n0 = int64_t{blockIdx.x} * kRows, chunks = (p.D + kChunk - 1) / kChunk;
  const int64_t begin = chunks * split / p.splits, end = chunks * (split + 1) / p.splits;
  const int64_t last = p.J - 1;
  const int64_t rows[2] = {n0 + g < p.J ? n0 + g : last, n0 + g + 8 < p.J ? n0 + g + 8 : last};
  load_decode_tables(p.weight, tables);
  __syncthreads();
  load_pairs<Element>(tables, pairs);
  __syncthreads();

  // Two chunks under way; each is fetched again as soon as it is used.
  float sums[kTokenTiles][4] = {};
  const int64_t first = begin + warp;
  Chunk even{}, odd{};
  if (first < end) even = fetch_chunk(p, rows, first * kChunk);
  if (first + kWarps < end) odd = fetch_chunk(p, rows, (first + kWarps) * kChunk);
  for (int64_t c = first; c < end; c += 2 * kWarps) {
    const Chunk now = even;
    if (c + 2 * kWarps < end) even = fetch_chunk(p, rows, (c + 2 * kWarps) * kChunk);
    add_chunk<Element>(sums, now, p, c * kChunk, pairs, tables);
    if (c + kWarps >= end) break;
    const Chunk next = odd;
    if (c + 3 * kWarps < end) odd = fetch_chunk(p, rows, (c + 3 * kWarps) * kChunk);
    add_chunk<Element>(sums, next, p, (c + kWarps) * kChunk, pairs, tables);
  }

  // The warps' sums in their order; the table makes room for them: [warp][m][n].
  __syncthreads();
  float* shares = reinterpret_cast<float*>(pairs);
  constexpr int kOutputs = 8 * kTokenTiles * kRows;
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      shares[warp * kOutputs + (8 * t + 2 * q + i % 2) * kRows + g + i / 2 * 8] = sums[t][i];
  __syncthreads();
  const int64_t m = threadIdx.x / kRows, n = n0 + threadIdx.x % kRows;
  if (threadIdx.x >= kOutputs || m >= p.M || n >= p.J) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shares[w * kOutputs + threadIdx.x];
  if (split == 0 && p.R) sum += lora_term(p, m, n);
  emit(p, split, m, n, sum);
}

template <class Element>
void launch(const Product& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.J, kRows)), p.splits);
  if (p.M > 8)
    lora_linear_few_rows<Element, 2><<<grid, kThreads, 0, stream>>>(p);
  else
    lora_linear_few_rows<Element, 1><<<grid, kThreads, 0, stream>>>(p);
}

}  // namespace

int few_rows_splits(const Product& p) {
  return split_count(ceil_div(p.J, kRows), ceil_div(p.D, kChunk), 2 * kWarps, 16);
}

void launch_few_rows(const Product& p, cudaStream_t stream) {
  if (p.left.dtype == DType::kBFloat16)
    launch<__nv_bfloat16>(p, stream);
  else
    launch<__half>(p, stream);
}

}  // namespace halfbyte::cuda
