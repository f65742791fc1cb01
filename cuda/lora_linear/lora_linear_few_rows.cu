// y = x W^T for 1 to 16 rows of bf16 or fp16 activations: as fast as the packed bytes can be read.
//
//   block     16 rows of W, eight warps; warp w sums chunks w, w + 8, .. of 128 elements of k
//   mma       W is the 16-row operand and x the 8-column one, so that no product is wasted on the
//             16 - M rows that are not there: out^T[n, m] = sum_k W[n, k] x[m, k]
//   chunk     lane 4 g + q loads 8 bytes of each of the two blocks of rows g and g + 8, and the
//   same
//             16 elements of x (the order of a sum over k is free):
//
//       row g   |   block 0: k 0..63    |   block 1: k 64..127  |
//               | q=0 | q=1 | q=2 | q=3 | q=0 | q=1 | q=2 | q=3 |    32 bytes, a sector, a block
//
//   scales    four a chunk and four lanes q: lane q reads and decodes that of row g + 8 (q % 2),
//             block q / 2; shuffles hand them around
//   decode    a byte is an index into 256 pairs of levels, in 32 copies, one a bank: one
//             conflict-free word of shared memory for two weights
//
// The sum over 64 elements of a block is scaled once, in fp32. Levels are rounded to the type of
// x, so a weight carries the same relative error as one that is decoded and then rounded.
//
// Why it is fast: every byte is read once, two chunks ahead of its use; addresses only advance; two
// weights cost a shift, a mask, an add and a load; the tensor cores do the rest.
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

using Pairs = uint32_t[256][32];

// pairs[byte][bank]: the levels of both nibbles, the first in the lower half.
template <class Element>
__device__ __forceinline__ void load_pairs(const DecodeTables& tables, Pairs& pairs) {
#pragma unroll
  for (int part = 0; part < 256 * 8 / kThreads; ++part) {
    const int i = part * kThreads + threadIdx.x;
    const int byte = i / 8;
    const uint32_t pair = pack_pair<Element>(tables.levels[byte >> 4], tables.levels[byte & 15]);
    *reinterpret_cast<uint4*>(&pairs[byte][i % 8 * 4]) = make_uint4(pair, pair, pair, pair);
  }
}

__device__ __forceinline__ uint32_t pair_at(const Pairs& pairs, uint32_t word, int byte) {
  const uint32_t offset = byte == 0 ? word << 7 : word >> (8 * byte - 7);
  const char* lane_pairs = reinterpret_cast<const char*>(&pairs[0][threadIdx.x % 32]);
  return *reinterpret_cast<const uint32_t*>(lane_pairs + (offset & 0x7F80));
}

// What a lane reads of a chunk: codes of rows g and g + 8, and one scale.
struct Chunk {
  uint2 codes[2][2];  // [row][block]
  RawScale scale;
};

// Where a lane reads: from the warp's first chunk on, in steps of kWarps chunks.
template <class Element, int kTokenTiles>
struct Place {
  const uint8_t* codes[2];
  int64_t scaled;  // an element of the block whose scale this lane reads
  const Element* x[kTokenTiles];

  __device__ __forceinline__ Place(const Product& p, int64_t n0, int64_t k0) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = row_inside(p, n0 + g + 8 * i);
      codes[i] = p.weight.bits.packed + (row * p.D + k0) / 2 + 8 * q;
    }
    scaled = row_inside(p, n0 + g + 8 * (q % 2)) * p.D + k0 + q / 2 * kBlock;
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const int64_t m = 8 * t + g < p.M ? 8 * t + g : p.M - 1;  // a sum that is not stored
      x[t] = static_cast<const Element*>(p.left.data) + m * p.D + k0 + 16 * q;
    }
  }
  static __device__ __forceinline__ int64_t row_inside(const Product& p, int64_t row) {
    return row < p.J ? row : p.J - 1;
  }
};

// The next chunk; of the last one of an odd number of blocks the second is not there.
template <class Element, int kTokenTiles>
__device__ __forceinline__ Chunk fetch_chunk(Place<Element, kTokenTiles>& place,
                                             const Nf4Bits& bits, bool whole) {
  Chunk chunk{};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    chunk.codes[i][0] = __ldg(reinterpret_cast<const uint2*>(place.codes[i]));
    if (whole)
      chunk.codes[i][1] = __ldg(reinterpret_cast<const uint2*>(place.codes[i] + kBlock / 2));
    place.codes[i] += kWarps * kChunk / 2;
  }
  if (whole || threadIdx.x % 4 < 2)
    chunk.scale = fetch_scale(bits, place.scaled >> bits.block_shift);
  place.scaled += kWarps * kChunk;
  return chunk;
}

// sums[t]: out[n, 8 t + m] of the 16 rows of W.
template <class Element, int kTokenTiles>
__device__ __forceinline__ void add_chunk(float (&sums)[kTokenTiles][4], const Chunk& chunk,
                                          Place<Element, kTokenTiles>& place, const Nf4Bits& bits,
                                          bool whole, const Pairs& pairs,
                                          const DecodeTables& tables) {
  const float scale = scale_value(bits, tables, chunk.scale);
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    if (b == 1 && !whole) break;
    uint4 x[kTokenTiles][2];
    float block_sums[kTokenTiles][4] = {};
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        x[t][j] = __ldg(reinterpret_cast<const uint4*>(place.x[t] + b * kBlock) + j);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t low = s < 2 ? chunk.codes[0][b].x : chunk.codes[0][b].y;
      const uint32_t high = s < 2 ? chunk.codes[1][b].x : chunk.codes[1][b].y;
      const int byte = 2 * (s % 2);
      const uint32_t w[4] = {pair_at(pairs, low, byte), pair_at(pairs, high, byte),
                             pair_at(pairs, low, byte + 1), pair_at(pairs, high, byte + 1)};
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const uint4 v = x[t][s / 2];
        mma_m16n8k16<Element>(block_sums[t], w, s % 2 ? v.z : v.x, s % 2 ? v.w : v.y);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float row_scale = __shfl_sync(~0u, scale, 2 * b + i, 4);
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        sums[t][2 * i] = fmaf(row_scale, block_sums[t][2 * i], sums[t][2 * i]);
        sums[t][2 * i + 1] = fmaf(row_scale, block_sums[t][2 * i + 1], sums[t][2 * i + 1]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) place.x[t] += kWarps * kChunk;
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
  __shared__ __align__(16) Pairs pairs;
  __shared__ DecodeTables tables;

  // Set-up: this block's rows of W, this split's chunks; the first two of them are on their way
  // while the tables are made.
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, warp = threadIdx.x / 32;
  const int split = blockIdx.y;
  const int64_t n0 = int64_t{blockIdx.x} * kRows, chunks = (p.D + kChunk - 1) / kChunk;
  const int64_t first = chunks * split / p.splits + warp, end = chunks * (split + 1) / p.splits;
  const int64_t whole_chunks = p.D / kChunk;
  const Nf4Bits& bits = p.weight.bits;
  Place<Element, kTokenTiles> place(p, n0, first * kChunk);
  Chunk even{}, odd{};
  if (first < end) even = fetch_chunk(place, bits, first < whole_chunks);
  if (first + kWarps < end) odd = fetch_chunk(place, bits, first + kWarps < whole_chunks);
  load_decode_tables<kThreads>(p.weight, tables);
  __syncthreads();
  load_pairs<Element>(tables, pairs);
  __syncthreads();

  // Two chunks under way; each is fetched again as soon as it is used.
  float sums[kTokenTiles][4] = {};
  for (int64_t c = first; c < end; c += 2 * kWarps) {
    const Chunk now = even;
    if (c + 2 * kWarps < end) even = fetch_chunk(place, bits, c + 2 * kWarps < whole_chunks);
    add_chunk(sums, now, place, bits, c < whole_chunks, pairs, tables);
    if (c + kWarps >= end) break;
    const Chunk next = odd;
    if (c + 3 * kWarps < end) odd = fetch_chunk(place, bits, c + 3 * kWarps < whole_chunks);
    add_chunk(sums, next, place, bits, c + kWarps < whole_chunks, pairs, tables);
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
  if (p.splits > 1) {
    p.partials[(split * p.M + m) * p.J + n] = sum;
    return;
  }
  if (p.bias.data) sum += load_element(p.bias, n);
  static_cast<Element*>(p.out.data)[m * p.J + n] = from_float<Element>(sum);
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
