// y = x W^T for 1 to 16 rows, any type and any shape: one warp a row of W, fp32 multiplications.
//
//   lane l of the warp sums elements 8 l .. 8 l + 7 of each 256 of k:
//
//       W[n, k0 ..]   | lane 0: 8 | lane 1: 8 | ... | lane 31: 8 |   4 bytes a lane (5 where an odd
//       x[m, k0 ..]   | lane 0: 8 | lane 1: 8 | ... | lane 31: 8 |   K shifts the nibbles)
//
// decode_run takes care of blocks that straddle rows, of odd positions and of the end of a row. W
// is rounded to the type of x, as dequantizing would. The lanes' sums are added by a fixed tree.
//
// Why it is fast enough: a row of W is read once for all rows of x, and what the lanes of a warp
// read is contiguous; fp32 activations of aligned rows come in 16-byte loads.
#include "lora_linear/operand.cuh"
#include "lora_linear/weight_decode.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxTokens = 16;
constexpr int kRun = 8;

// x[m, k .. k + 7]; 0 from `count` on.
template <class Element>
__device__ __forceinline__ void load_run(const Product& p, int64_t m, int64_t k, int count,
                                         float (&out)[kRun]) {
  const Element* x = static_cast<const Element*>(p.left.data) + m * p.D + k;
  if (sizeof(Element) == 4 && count == kRun && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    const float4 low = *reinterpret_cast<const float4*>(x);
    const float4 high = *(reinterpret_cast<const float4*>(x) + 1);
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) out[i] = i < count ? to_float(x[i]) : 0.0f;
}

template <class Element>
__global__ void __launch_bounds__(32 * kWarps)
    lora_linear_few_rows_fma(const __grid_constant__ Product p) {
  __shared__ DecodeTables tables;
  load_decode_tables<32 * kWarps>(p.weight, tables);
  __syncthreads();

  const int lane = threadIdx.x % 32;
  const int64_t n = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (n >= p.J) return;

  float sums[kMaxTokens] = {};
  for (int64_t k = kRun * lane; k < p.D; k += 32 * kRun) {
    const int count = p.D - k < kRun ? static_cast<int>(p.D - k) : kRun;
    float w[kRun];
    decode_run(p.weight.bits, tables, n * p.D + k, count, w);
#pragma unroll
    for (int i = 0; i < kRun; ++i) w[i] = to_float(from_float<Element>(w[i]));
#pragma unroll
    for (int m = 0; m < kMaxTokens; ++m) {
      if (m >= p.M) break;
      float x[kRun];
      load_run<Element>(p, m, k, count, x);
#pragma unroll
      for (int i = 0; i < kRun; ++i) sums[m] = fmaf(x[i], w[i], sums[m]);
    }
  }
  for (int64_t r = lane; r < p.R; r += 32) {
    const float b = p.lora_scale * load_element(p.lora_right, n * p.R + r);
#pragma unroll
    for (int m = 0; m < kMaxTokens; ++m)
      if (m < p.M) sums[m] = fmaf(p.lora_left[m * p.R + r], b, sums[m]);
  }

  const float bias = p.bias.data ? load_element(p.bias, n) : 0.0f;
  Element* out = static_cast<Element*>(p.out.data) + n;
#pragma unroll
  for (int m = 0; m < kMaxTokens; ++m) {
    if (m >= p.M) break;
#pragma unroll
    for (int step = 16; step; step /= 2) sums[m] += __shfl_xor_sync(~0u, sums[m], step);
    if (lane == 0) out[m * p.J] = from_float<Element>(sums[m] + bias);
  }
}

}  // namespace

int few_rows_fma_splits(const Product&) {
  return 1;
}

void launch_few_rows_fma(const Product& p, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>(ceil_div(p.J, kWarps));
  switch (p.left.dtype) {
    case DType::kFloat32:
      lora_linear_few_rows_fma<float><<<grid, 32 * kWarps, 0, stream>>>(p);
      break;
    case DType::kBFloat16:
      lora_linear_few_rows_fma<__nv_bfloat16><<<grid, 32 * kWarps, 0, stream>>>(p);
      break;
    default:
      lora_linear_few_rows_fma<__half><<<grid, 32 * kWarps, 0, stream>>>(p);
  }
}

}  // namespace halfbyte::cuda
