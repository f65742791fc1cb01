// Dequantization in one launch, double-quantized scales decoded on the way.
//
//   out[i] = round(levels[code[i]] * scale(i >> block_shift))    fp32 product, then to out's dtype
//
// Layout of the fast path: a warp takes a tile of 1,024 elements = 512 packed bytes, 16 a lane. The
// codes pass through 512 bytes of shared memory, so that each store of the warp writes 512
// neighbouring bytes, 16 a lane, whatever the type: 8 elements of a 2-byte type, 4 of float32. Lane
// l decodes the tile's scale l, of at most 32 at block size 32; shuffles hand scales out.
// What does not fill a tile, and everything at unaligned addresses, goes a byte a thread.
//
// Why it is fast: of a 2-byte type four fifths of the traffic are writes, and they are whole lines;
// a scale is decoded once a block, not once a lane; the levels are looked up without bank
// conflicts.
#include "device/elements.cuh"
#include "device/error.h"
#include "device/launch.h"
#include "device/nf4_decode.cuh"
#include "device/reduce.cuh"
#include "nf4/nf4_impl.h"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 6;
constexpr int kWarps = kThreads / kLanes;
constexpr int kTile = 1024;

__device__ __forceinline__ uint4 pack(const float (&values)[4], float*) {
  return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                    __float_as_uint(values[2]), __float_as_uint(values[3]));
}
__device__ __forceinline__ uint4 pack(const float (&values)[8], __nv_bfloat16*) {
  return make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                    pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7]));
}
__device__ __forceinline__ uint4 pack(const float (&values)[8], __half*) {
  return make_uint4(pack_fp16(values[0], values[1]), pack_fp16(values[2], values[3]),
                    pack_fp16(values[4], values[5]), pack_fp16(values[6], values[7]));
}

__device__ __forceinline__ void store(float* out, float value) {
  *out = value;
}
__device__ __forceinline__ void store(__nv_bfloat16* out, float value) {
  *out = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void store(__half* out, float value) {
  *out = __float2half_rn(value);
}

// `codes`: this warp's 512 bytes of shared memory.
template <class Element>
__device__ __forceinline__ void dequantize_tile(const Nf4Bits& bits, const DecodeTables& tables,
                                                uint4* codes, int64_t tile, Element* out) {
  constexpr int kPerLane = 16 / sizeof(Element);
  const int lane = threadIdx.x % kLanes;
  const uint4 loaded = reinterpret_cast<const uint4*>(bits.packed)[tile * kLanes + lane];

  const int scales = kTile >> bits.block_shift;  // 0: the tile lies in one block
  const int64_t first_block = tile * kTile >> bits.block_shift;
  const float lane_scale =
      lane < scales || lane == 0 ? block_scale(bits, tables, first_block + lane) : 0.0f;

  __syncwarp();  // the codes of the tile before have been read
  codes[lane] = loaded;
  __syncwarp();
#pragma unroll
  for (int step = 0; step < kTile / (kLanes * kPerLane); ++step) {
    const int at = (step * kLanes + lane) * kPerLane;
    const float scale = __shfl_sync(kFullWarp, lane_scale, at >> bits.block_shift);
    const uint32_t packed = kPerLane == 8 ? reinterpret_cast<const uint32_t*>(codes)[at / 8]
                                          : reinterpret_cast<const uint16_t*>(codes)[at / 4];
    float values[kPerLane];
    decode_codes(packed, tables.levels, scale, values);
    *reinterpret_cast<uint4*>(out + tile * kTile + at) = pack(values, out);
  }
}

// The two elements of byte `pair`, the last byte's second one only if there is one.
template <class Element>
__device__ __forceinline__ void dequantize_pair(const Nf4Bits& bits, const DecodeTables& tables,
                                                int64_t pair, Element* out) {
  const float scale = block_scale(bits, tables, 2 * pair >> bits.block_shift);
  float values[2];
  decode_codes(bits.packed[pair], tables.levels, scale, values);
  store(out + 2 * pair, values[0]);
  if (2 * pair + 1 < bits.count) store(out + 2 * pair + 1, values[1]);
}

template <class Element>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    dequantize_4bit_kernel(const __grid_constant__ Weight weight, Element* __restrict__ out,
                           int64_t tiles) {
  __shared__ DecodeTables tables;
  __shared__ uint4 codes[kWarps][kLanes];
  load_decode_tables<kThreads>(weight, tables);
  __syncthreads();

  const int warp = threadIdx.x / kLanes;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp; tile < tiles;
       tile += static_cast<int64_t>(gridDim.x) * kWarps)
    dequantize_tile(weight.bits, tables, codes[warp], tile, out);

  const int64_t pairs = (weight.bits.count + 1) / 2;
  int64_t pair = tiles * (kTile / 2) + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; pair < pairs; pair += static_cast<int64_t>(gridDim.x) * kThreads)
    dequantize_pair(weight.bits, tables, pair, out);
}

template <class Element>
void start(const DequantizeLaunch& launch, int64_t tiles, cudaStream_t stream) {
  const int64_t count = launch.weight.bits.count;
  const unsigned grid = tiles > 0
                            ? grid_size(ceil_div(count, kTile), kWarps, kBlocksPerMultiprocessor)
                            : grid_size(ceil_div(count, 2), kThreads, kBlocksPerMultiprocessor);
  dequantize_4bit_kernel<<<grid, kThreads, 0, stream>>>(
      launch.weight, static_cast<Element*>(launch.out.data), tiles);
}

const char* dequantize(const DequantizeLaunch& launch, int64_t tiles, Where where) {
  const auto stream = static_cast<cudaStream_t>(where.stream);
  switch (launch.out.dtype) {
    case DType::kFloat32:
      start<float>(launch, tiles, stream);
      break;
    case DType::kBFloat16:
      start<__nv_bfloat16>(launch, tiles, stream);
      break;
    case DType::kFloat16:
      start<__half>(launch, tiles, stream);
      break;
    default:
      return "out: expected float32, bfloat16 or float16";
  }
  return launched("dequantize_4bit");
}

}  // namespace

const char* dequantize_sm80(const DequantizeLaunch& launch, Where where) {
  return dequantize(launch, launch.weight.bits.count / kTile, where);
}

const char* dequantize_portable(const DequantizeLaunch& launch, Where where) {
  return dequantize(launch, 0, where);
}

}  // namespace halfbyte::cuda
