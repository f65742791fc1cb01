// The scales of a 4-bit weight in 8 bits.
//
//   d[b]             = absmax[b] - offset
//   nested_absmax[n] = max |d[b]| over block n of 256
//   code[b]          = signed dynamic map's nearest code of d[b] * lift * (1 / (nested * lift))
//
// lift is 2^100 where the reciprocal overflows, 1 elsewhere. One warp a block of 256, eight
// neighbours a lane: no barrier after the tables are in shared memory. Elements past the end count
// as d = 0.
#include "device/dynamic8.cuh"
#include "device/elements.cuh"
#include "device/error.h"
#include "device/launch.h"
#include "device/reduce.cuh"
#include "nf4/nf4_impl.h"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 6;
constexpr float kLargestFloat = 3.402823466e38f;
constexpr float kLift = 1.2676506002282294e30f;  // 2^100

struct NestedArgs {
  const float* absmax;
  int64_t blocks;
  const float* offset;
  uint8_t* codes;
  float* nested_absmax;
  bool aligned;  // absmax to 16 bytes and codes to 8
};

__device__ __forceinline__ void encode_nested_block(const NestedArgs& args,
                                                    const SignedBinPair& bins, float offset,
                                                    int64_t nested) {
  const int lane = threadIdx.x % kLanes;
  const int64_t index = nested * kDynamic8Block + lane * kLaneElements;
  const int64_t left = args.blocks - index;
  const bool whole = args.aligned && left >= kLaneElements;
  const int count = static_cast<int>(left < 0 ? 0 : left < 8 ? left : 8);
  float values[8];
  to_floats(whole ? load_whole(args.absmax, 4, index) : load_some(args.absmax, 4, index, count),
            DType::kFloat32, values);
  float largest = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    values[j] = j < count ? __fsub_rn(values[j], offset) : 0.0f;
    largest = fmaxf(largest, fabsf(values[j]));
  }
  largest = warp_max_magnitude(largest);
  if (lane == 0) args.nested_absmax[nested] = largest;

  float lift = 1;
  float inverse = largest > 0 ? __frcp_rn(largest) : 0.0f;
  if (inverse > kLargestFloat) {
    lift = kLift;
    inverse = __frcp_rn(__fmul_rn(largest, kLift));
  }
  Raw8 codes = {};
#pragma unroll
  for (int j = 0; j < 8; ++j)
    codes.word[j / 4] |= encode8_signed(bins, __fmul_rn(__fmul_rn(values[j], lift), inverse))
                         << 8 * (j % 4);
  if (whole) {
    store_whole(args.codes, 1, index, codes);
  } else {
    store_some(args.codes, 1, index, count, codes);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    double_quantize_kernel(const __grid_constant__ NestedArgs args) {
  __shared__ __align__(16) SignedBinPair bins;
  copy_table(kSignedBins, bins);
  __syncthreads();

  const float offset = *args.offset;
  const int64_t nested_blocks = (args.blocks + kDynamic8Block - 1) / kDynamic8Block;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
  int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  for (; warp < nested_blocks; warp += warps) encode_nested_block(args, bins, offset, warp);
}

}  // namespace

const char* double_quantize_sm80(const DoubleQuantizeLaunch& launch, Where where) {
  const NestedArgs args{
      launch.absmax,        launch.blocks,
      launch.offset,        launch.codes,
      launch.nested_absmax, is_aligned(launch.absmax, 16) && is_aligned(launch.codes, 8)};
  const unsigned grid = grid_size(ceil_div(launch.blocks, kDynamic8Block), kThreads / kLanes,
                                  kBlocksPerMultiprocessor);
  double_quantize_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(where.stream)>>>(args);
  return launched("double_quantize");
}

}  // namespace halfbyte::cuda
