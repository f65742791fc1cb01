// What both skinny kernels share: four neighbouring elements of a row of an operand as fp32, and
// the way out.
#pragma once

#include "lora_linear/operand.cuh"

namespace halfbyte::cuda {

constexpr int kRun = 4;

// Whether every run that lies inside of the matrix is one aligned load.
__device__ __forceinline__ bool runs_are_aligned(const SkinnyOperand& operand) {
  const uintptr_t bytes = operand.matrix.dtype == DType::kFloat32 ? 16 : 8;
  return operand.cols % kRun == 0 && reinterpret_cast<uintptr_t>(operand.matrix.data) % bytes == 0;
}

__device__ __forceinline__ float4 load_whole_run(const Operand& matrix, int64_t index) {
  if (matrix.dtype == DType::kFloat32)
    return *reinterpret_cast<const float4*>(static_cast<const float*>(matrix.data) + index);
  const uint2 raw =
      *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(matrix.data) + index);
  const uint32_t words[4] = {raw.x & 0xFFFF, raw.x >> 16, raw.y & 0xFFFF, raw.y >> 16};
  float out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    out[i] = matrix.dtype == DType::kBFloat16
                 ? __uint_as_float(words[i] << 16)
                 : __half2float(__ushort_as_half(static_cast<unsigned short>(words[i])));
  return make_float4(out[0], out[1], out[2], out[3]);
}

// Elements index .. index + 3, of which `inside` are inside of the matrix; 0 for the others.
__device__ __forceinline__ float4 load_run(const Operand& matrix, bool aligned, int64_t index,
                                           int64_t inside) {
  float4 run = make_float4(0, 0, 0, 0);
  if (inside <= 0) return run;
  if (aligned) return load_whole_run(matrix, index);
  run.x = load_element(matrix, index);
  if (inside > 1) run.y = load_element(matrix, index + 1);
  if (inside > 2) run.z = load_element(matrix, index + 2);
  if (inside > 3) run.w = load_element(matrix, index + 3);
  return run;
}

// What one thread contributes to out(i, j): the element itself, or its part of a split sum.
__device__ __forceinline__ void emit(const SkinnyProduct& p, int split, int64_t i, int64_t j,
                                     float sum) {
  if (p.splits > 1)
    p.partials[(split * p.I + i) * p.J + j] = sum;
  else
    store_element(p.out, i * p.out_i + j * p.out_j, p.alpha * sum);
}

}  // namespace halfbyte::cuda
