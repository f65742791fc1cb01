// The fused product for many rows: packed bytes in, out[m, j] = sum_d left[m, d] W'[d, j] out, for
// bf16 and fp16, by mma.sync, ldmatrix and cp.async (compute capability 8.0 and later).
//
//   tile      64 or 128 rows x 128 columns, steps of 64 along d, four warps of 32 columns each
//   left      [rows][64] elements in shared memory, stages filled by cp.async; a row is eight
//             16-byte chunks, chunk c of row r lies at c ^ (r % 8): copies and ldmatrix meet no
//             bank twice
//   weight    decoded in registers, straight into the B operand of the mma:
//
//     forward: lane (g, q) needs bytes q, q + 4, .. of row g        backward: bytes 2 g, 2 g + 1 of
//                                                                   rows 2 q, 2 q + 1, 2 q + 8, ..
//       row g   |b0 b1 b2 b3|b4 b5 b6 b7| ..  32 bytes = 64 d         row d  | .. |b2g b2g+1| ..
//                 q=0 1 2 3    0  1  2  3                             one byte pair = 4 columns,
//                 one
//       two 16-byte loads, transposed 4 x 4 by byte                   for each of the 4 mma tiles
//       permutations, exchanged within the warp
//
// Why it is fast: a weight is read once a row tile as half a byte and decoded once a block; a
// level costs one word of shared memory without bank conflicts (16 levels in 16 banks), and the
// product with the scale is rounded once to the operand's type, as dequantizing would; the
// next step's bytes and activations are under way while this step's are multiplied; no layout of
// the weight but the stored one exists.
//
// Invariants: row_length % 64 == 0, block size >= 64 (so a step lies in one block), `left` and the
// codes on 16-byte boundaries, left rows of whole 16-byte chunks (sm80_fits).
#include "device/cp_async.cuh"
#include "device/ldmatrix.cuh"
#include "lora_linear/warp_tile.cuh"
#include "lora_linear/weight_decode.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kStep = 64;              // along d
constexpr int kColTiles = 4;           // mma tiles of a warp: 32 columns
constexpr int kColumns = kWarps * 32;  // of a block
constexpr int kLeftRowBytes = kStep * 2;

template <int kRowTiles>
constexpr int kStages = kRowTiles == 8 ? 2 : 3;

// --- left: the activations -----------------------------------------------------------------------

template <int kRowTiles>
__device__ __forceinline__ void stage_left(uint32_t stage, const Product& p, int64_t m0,
                                           int64_t d0) {
  const int chunk = threadIdx.x % 8, first_row = threadIdx.x / 8;
  const int64_t d = d0 + 8 * chunk;
  const char* data = static_cast<const char*>(p.left.data);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    const int row = first_row + 16 * i;
    const bool valid = m0 + row < p.M && d < p.D;
    const char* source = valid ? data + ((m0 + row) * p.D + d) * 2 : data;
    cp_async_16(stage + row * kLeftRowBytes + ((chunk ^ row % 8) << 4), source, valid);
  }
}

// The A operand of rows 16 i .. 16 i + 15, elements 16 s .. 16 s + 15 of the step.
__device__ __forceinline__ void load_left(uint32_t (&a)[4], uint32_t stage, int i, int s) {
  const int lane = threadIdx.x % 32;
  const uint32_t row = stage + (lane % 16) * kLeftRowBytes;
  const uint32_t chunk = ((lane / 16) ^ (lane % 8)) << 4;
  ldmatrix_x4(a, row + i * (16 * kLeftRowBytes) + (chunk ^ (s << 5)));
}

// sums += mma step s of all row tiles, b[t] the B operand of column tile t.
template <class Element, int kRowTiles>
__device__ __forceinline__ void multiply_left(float (&sums)[kRowTiles][kColTiles][4],
                                              uint32_t stage, int s,
                                              const uint32_t (&b)[kColTiles][2]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    uint32_t a[4];
    load_left(a, stage, i, s);
#pragma unroll
    for (int t = 0; t < kColTiles; ++t) mma_m16n8k16<Element>(sums[i][t], a, b[t][0], b[t][1]);
  }
}

// --- levels --------------------------------------------------------------------------------------

// The level of the nibble at bit `bit` of `word`. Sixteen words lie in sixteen banks: no two lanes
// wait for each other.
__device__ __forceinline__ float level_at(const float (&levels)[16], uint32_t word, int bit) {
  const uint32_t offset = bit >= 2 ? word >> (bit - 2) : word << (2 - bit);
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(levels) + (offset & 0x3C));
}

// --- forward: W'[d, j] = W[j, d] -----------------------------------------------------------------

// A step's codes of the warp's 32 rows: lane l loads 16 bytes, half l % 2, of slots l / 2 and
// 16 + l / 2, and the scale of slot l.
struct RowCodes {
  uint4 chunk[2];
  RawScale scale;
};

__device__ __forceinline__ int64_t row_of_slot(const Product& p, int64_t warp_j0, int slot) {
  const int64_t row = warp_j0 + kColTiles * (slot % 8) + slot / 8;
  return row < p.J ? row : p.J - 1;  // a column that is not stored
}

__device__ __forceinline__ RowCodes fetch_rows(const Product& p, int64_t warp_j0, int64_t d0) {
  const int lane = threadIdx.x % 32;
  RowCodes codes;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t element = row_of_slot(p, warp_j0, lane / 2 + 16 * i) * p.D + d0;
    codes.chunk[i] =
        __ldg(reinterpret_cast<const uint4*>(p.weight.bits.packed + element / 2 + 16 * (lane % 2)));
  }
  const int64_t element = row_of_slot(p, warp_j0, lane) * p.D + d0;
  codes.scale = fetch_scale(p.weight.bits, element >> p.weight.bits.block_shift);
  return codes;
}

// Byte q of each of four words, for q = 0..3.
__device__ __forceinline__ uint4 transpose_bytes(uint4 w) {
  const uint32_t low01 = __byte_perm(w.x, w.y, 0x5140), high01 = __byte_perm(w.x, w.y, 0x7362);
  const uint32_t low23 = __byte_perm(w.z, w.w, 0x5140), high23 = __byte_perm(w.z, w.w, 0x7362);
  return make_uint4(__byte_perm(low01, low23, 0x5410), __byte_perm(low01, low23, 0x7632),
                    __byte_perm(high01, high23, 0x5410), __byte_perm(high01, high23, 0x7632));
}

// A warp's exchange buffer: [half of the step][slot] 16 bytes; the halves are half a row of banks
// apart, so that neither the stores nor the loads below meet a bank twice.
constexpr int kHalfWords = 32 * 4 + 16;

// own[t][h]: the four bytes of slot 8 t + g that hold this lane's elements of half h.
__device__ __forceinline__ void exchange_rows(uint32_t (&own)[kColTiles][2], const RowCodes& codes,
                                              uint32_t (&buffer)[2 * kHalfWords]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    *reinterpret_cast<uint4*>(&buffer[lane % 2 * kHalfWords + (lane / 2 + 16 * i) * 4]) =
        transpose_bytes(codes.chunk[i]);
  __syncwarp();
#pragma unroll
  for (int t = 0; t < kColTiles; ++t)
#pragma unroll
    for (int h = 0; h < 2; ++h) own[t][h] = buffer[h * kHalfWords + t * 32 + lane];
}

template <class Element, int kRowTiles>
__global__ void __launch_bounds__(kThreads, 2)
    lora_linear_forward_sm80(const __grid_constant__ Product p) {
  __shared__ __align__(1024) unsigned char left[kStages<kRowTiles>][16 * kRowTiles * kLeftRowBytes];
  __shared__ __align__(16) uint32_t exchange[kWarps][2 * kHalfWords];
  __shared__ DecodeTables tables;
  static_assert(sizeof(left) >= kLoraFloats<kRowTiles, kColTiles> * sizeof(float), "");

  // Set-up: this block's tile, this warp's columns, this split's steps.
  const int lane = threadIdx.x % 32, g = lane / 4, warp = threadIdx.x / 32, split = blockIdx.z;
  const int64_t m0 = int64_t{blockIdx.x} * (16 * kRowTiles), j0 = int64_t{blockIdx.y} * kColumns;
  const int64_t warp_j0 = j0 + 32 * warp, steps = p.D / kStep;
  const int64_t begin = steps * split / p.splits, end = steps * (split + 1) / p.splits;
  load_decode_tables<kThreads>(p.weight, tables);
  float sums[kRowTiles][kColTiles][4];
  start_sums(sums, p, split, m0, j0, warp_j0, reinterpret_cast<float*>(left));
  __syncthreads();

  // Fill the pipeline: all stages of activations but one, one step of codes.
  constexpr int kAhead = kStages<kRowTiles> - 1;
  for (int i = 0; i < kAhead; ++i) {
    if (begin + i < end) stage_left<kRowTiles>(shared_address(left[i]), p, m0, (begin + i) * kStep);
    cp_async_commit();
  }
  RowCodes codes = fetch_rows(p, warp_j0, begin * kStep);

  int stage = 0, free_stage = kAhead;
  for (int64_t step = begin; step < end; ++step) {
    // This step's activations have arrived, and nobody reads the stage that is filled next.
    cp_async_wait<kAhead - 1>();
    __syncthreads();
    if (step + kAhead < end)
      stage_left<kRowTiles>(shared_address(left[free_stage]), p, m0, (step + kAhead) * kStep);
    cp_async_commit();

    // This step's codes to the lanes that decode them; the next step's on their way.
    uint32_t own[kColTiles][2];
    exchange_rows(own, codes, exchange[warp]);
    const float lane_scale = scale_value(p.weight.bits, tables, codes.scale);
    float scale[kColTiles];
#pragma unroll
    for (int t = 0; t < kColTiles; ++t) scale[t] = __shfl_sync(~0u, lane_scale, 8 * t + g);
    if (step + 1 < end) codes = fetch_rows(p, warp_j0, (step + 1) * kStep);

    const uint32_t stage_address = shared_address(left[stage]);
#pragma unroll
    for (int s = 0; s < kStep / 16; ++s) {
      uint32_t b[kColTiles][2];
#pragma unroll
      for (int t = 0; t < kColTiles; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t word = own[t][s / 2];
          const int bit = 8 * (2 * (s % 2) + i);
          b[t][i] = pack_pair<Element>(scale[t] * level_at(tables.levels, word, bit + 4),
                                       scale[t] * level_at(tables.levels, word, bit));
        }
      multiply_left<Element>(sums, stage_address, s, b);
    }
    stage = stage == kAhead ? 0 : stage + 1;
    free_stage = free_stage == kAhead ? 0 : free_stage + 1;
  }
  store_tile<Element>(sums, p, split, m0, warp_j0);
}

// --- backward: W'[d, j] = W[d, j] ----------------------------------------------------------------

// A step's codes: 64 rows of 64 bytes, one 16-byte chunk a warp; chunk c of row r lies at
// c ^ (r / 2 % 4), so that rows 2 q, q = 0..3, of a warp's chunk lie in different banks.
constexpr int kCodeRowBytes = kColumns / 2;

__device__ __forceinline__ void stage_codes(uint32_t stage, const Product& p, int64_t d0,
                                            int64_t j0) {
  const int chunk = threadIdx.x % 4;
  const int64_t j = j0 + 32 * chunk;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = threadIdx.x / 4 + 32 * i;
    const bool valid = d0 + row < p.D && j < p.J;
    const uint8_t* packed = p.weight.bits.packed;
    cp_async_16(stage + row * kCodeRowBytes + ((chunk ^ row / 2 % 4) << 4),
                valid ? packed + ((d0 + row) * p.J + j) / 2 : packed, valid);
  }
}

// Thread i: row i % 64 of the step, columns of half i / 64 of the tile. Nothing outside is read.
__device__ __forceinline__ RawScale fetch_row_scale(const Product& p, int64_t d0, int64_t j0) {
  int64_t d = d0 + threadIdx.x % kStep, j = j0 + kStep * (threadIdx.x / kStep);
  if (d >= p.D) d = p.D - 1;
  if (j >= p.J) j = j0;
  return fetch_scale(p.weight.bits, (d * p.J + j) >> p.weight.bits.block_shift);
}

// b[t] of mma step s: column t of the lane's four, rows 16 s + {2q, 2q+1, 2q+8, 2q+9}.
template <class Element>
__device__ __forceinline__ void decode_columns(uint32_t (&b)[kColTiles][2],
                                               const unsigned char* codes, const float* scales,
                                               const float (&levels)[16]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t first = *reinterpret_cast<const uint16_t*>(codes + 8 * i * kCodeRowBytes);
    const uint32_t second = *reinterpret_cast<const uint16_t*>(codes + (8 * i + 1) * kCodeRowBytes);
    const float2 scale = *reinterpret_cast<const float2*>(scales + 8 * i);
#pragma unroll
    for (int t = 0; t < kColTiles; ++t) {
      const int bit = 8 * (t / 2) + (t % 2 ? 0 : 4);
      b[t][i] = pack_pair<Element>(scale.x * level_at(levels, first, bit),
                                   scale.y * level_at(levels, second, bit));
    }
  }
}

template <class Element, int kRowTiles>
__global__ void __launch_bounds__(kThreads, 2)
    lora_linear_backward_sm80(const __grid_constant__ Product p) {
  constexpr int kStageCount = kStages<kRowTiles>;
  __shared__ __align__(1024) unsigned char left[kStageCount][16 * kRowTiles * kLeftRowBytes];
  __shared__ __align__(16) unsigned char codes[kStageCount][kStep * kCodeRowBytes];
  __shared__ __align__(16) float scales[2][2][kStep];  // [step parity][half of the tile][row]
  __shared__ DecodeTables tables;
  static_assert(sizeof(left) >= kLoraFloats<kRowTiles, kColTiles> * sizeof(float), "");

  // Set-up: this block's tile, this warp's columns, this split's steps.
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, warp = threadIdx.x / 32;
  const int split = blockIdx.z;
  const int64_t m0 = int64_t{blockIdx.x} * (16 * kRowTiles), j0 = int64_t{blockIdx.y} * kColumns;
  const int64_t warp_j0 = j0 + 32 * warp, steps = (p.D + kStep - 1) / kStep;
  const int64_t begin = steps * split / p.splits, end = steps * (split + 1) / p.splits;
  load_decode_tables<kThreads>(p.weight, tables);
  float sums[kRowTiles][kColTiles][4];
  start_sums(sums, p, split, m0, j0, warp_j0, reinterpret_cast<float*>(left));
  __syncthreads();

  // Fill the pipeline: all stages but one; the scales of the first step, the second's on their way.
  constexpr int kAhead = kStageCount - 1;
  for (int i = 0; i < kAhead; ++i) {
    if (begin + i < end) {
      stage_left<kRowTiles>(shared_address(left[i]), p, m0, (begin + i) * kStep);
      stage_codes(shared_address(codes[i]), p, (begin + i) * kStep, j0);
    }
    cp_async_commit();
  }
  float* own_scale = &scales[0][threadIdx.x / kStep][threadIdx.x % kStep];
  RawScale raw = fetch_row_scale(p, begin * kStep, j0);
  own_scale[begin % 2 * (2 * kStep)] = scale_value(p.weight.bits, tables, raw);
  raw = fetch_row_scale(p, (begin + 1) * kStep, j0);

  int stage = 0, free_stage = kAhead;
  for (int64_t step = begin; step < end; ++step) {
    // This step's tiles and scales have arrived, and nobody reads those that are filled next.
    cp_async_wait<kAhead - 1>();
    __syncthreads();
    if (step + kAhead < end) {
      stage_left<kRowTiles>(shared_address(left[free_stage]), p, m0, (step + kAhead) * kStep);
      stage_codes(shared_address(codes[free_stage]), p, (step + kAhead) * kStep, j0);
    }
    cp_async_commit();
    own_scale[(step + 1) % 2 * (2 * kStep)] = scale_value(p.weight.bits, tables, raw);
    raw = fetch_row_scale(p, (step + 2) * kStep, j0);

    const uint32_t stage_address = shared_address(left[stage]);
    const unsigned char* own_codes = codes[stage] + 2 * q * kCodeRowBytes + 16 * (warp ^ q) + 2 * g;
    const float* row_scales = &scales[step % 2][warp / 2][2 * q];
#pragma unroll
    for (int s = 0; s < kStep / 16; ++s) {
      uint32_t b[kColTiles][2];
      decode_columns<Element>(b, own_codes + 16 * s * kCodeRowBytes, row_scales + 16 * s,
                              tables.levels);
      multiply_left<Element>(sums, stage_address, s, b);
    }
    stage = stage == kAhead ? 0 : stage + 1;
    free_stage = free_stage == kAhead ? 0 : free_stage + 1;
  }
  store_tile<Element>(sums, p, split, m0, warp_j0);
}

// --- launch --------------------------------------------------------------------------------------

int row_tiles(const Product& p) {
  return p.M > 64 ? 8 : 4;
}

template <class Element, int kRowTiles>
void launch(const Product& p, cudaStream_t stream) {
  const dim3 grid = tile_grid(p, 16 * kRowTiles, kColumns);
  if (p.transposed)
    lora_linear_backward_sm80<Element, kRowTiles><<<grid, kThreads, 0, stream>>>(p);
  else
    lora_linear_forward_sm80<Element, kRowTiles><<<grid, kThreads, 0, stream>>>(p);
}

template <class Element>
void launch_rows(const Product& p, cudaStream_t stream) {
  if (row_tiles(p) == 8)
    launch<Element, 8>(p, stream);
  else
    launch<Element, 4>(p, stream);
}

}  // namespace

int sm80_splits(const Product& p) {
  return split_count(tile_count(p, 16 * row_tiles(p), kColumns), ceil_div(p.D, kStep), 4, 16);
}

void launch_sm80(const Product& p, cudaStream_t stream) {
  if (p.left.dtype == DType::kBFloat16)
    launch_rows<__nv_bfloat16>(p, stream);
  else
    launch_rows<__half>(p, stream);
}

}  // namespace halfbyte::cuda
