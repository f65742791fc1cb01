// Kernels without communication between threads beyond a block: a sum, a 4-bit dequantize with a
// __constant__ table, an AdamW step, a reversal in dynamic shared memory.
#include <cuda_bf16.h>

#include <cstdint>

// A made-up 16-entry code: value = (i - 7.5) / 7.5.
__constant__ float kCode[16] = {-1.0f,        -0.8666667f,  -0.73333335f, -0.6f,
                                -0.46666667f, -0.33333334f, -0.2f,        -0.06666667f,
                                0.06666667f,  0.2f,         0.33333334f,  0.46666667f,
                                0.6f,         0.73333335f,  0.8666667f,   1.0f};

// sums[block] = sum of values[block * 256 .. block * 256 + 255], absent ones being 0.
extern "C" __global__ void block_sum(const float* values, float* sums, int count) {
  __shared__ float warp_sum[8];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = i < count ? values[i] : 0.0f;
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_down_sync(0xffffffffu, sum, distance);
  }
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int warp = 0; warp < 8; ++warp) total += warp_sum[warp];
    sums[blockIdx.x] = total;
  }
}

// values[i] = kCode[4-bit code i] * absmax[i / 64]; byte j has code 2j in its high half.
extern "C" __global__ void dequantize(const uint8_t* packed, const float* absmax,
                                      __nv_bfloat16* values, int count) {
  const int pair = blockIdx.x * blockDim.x + threadIdx.x;
  if (2 * pair + 1 >= count) return;
  const unsigned byte = packed[pair];
  const float scale = absmax[pair / 32];
  reinterpret_cast<__nv_bfloat162*>(values)[pair] =
      __floats2bfloat162_rn(kCode[byte >> 4] * scale, kCode[byte & 15] * scale);
}

// m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w = w (1 - lr wd) - step m / (sqrt(v) + eps)
extern "C" __global__ void adamw(float* w, float* m, float* v, const float* g, float lr,
                                 float beta1, float beta2, float epsilon, float weight_decay,
                                 int count) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    m[i] = __fmaf_rn(beta1, m[i], __fmul_rn(1.0f - beta1, g[i]));
    v[i] = __fmaf_rn(beta2, v[i], __fmul_rn(__fmul_rn(1.0f - beta2, g[i]), g[i]));
    const float decayed = __fmul_rn(w[i], __fmaf_rn(-lr, weight_decay, 1.0f));
    const float update = __fdiv_rn(m[i], __fadd_rn(__fsqrt_rn(v[i]), epsilon));
    w[i] = __fmaf_rn(-lr, update, decayed);
  }
}

// out[block] = in[block] back to front, through blockDim.x floats of dynamic shared memory.
extern "C" __global__ void reverse_block(const float* in, float* out) {
  extern __shared__ float staged[];
  const int base = blockIdx.x * blockDim.x;
  staged[threadIdx.x] = in[base + threadIdx.x];
  __syncthreads();
  out[base + threadIdx.x] = staged[blockDim.x - 1 - threadIdx.x];
}

// A histogram of bytes: 256 shared counters, then one atomic a bin into the global counts.
extern "C" __global__ void histogram(const uint8_t* bytes, unsigned* counts, int count) {
  __shared__ unsigned bins[256];
  for (int bin = threadIdx.x; bin < 256; bin += blockDim.x) bins[bin] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    atomicAdd(&bins[bytes[i]], 1u);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < 256; bin += blockDim.x) {
    if (bins[bin] != 0) atomicAdd(&counts[bin], bins[bin]);
  }
}
