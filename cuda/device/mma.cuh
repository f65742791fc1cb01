// Tensor core products of one warp: D[16, 8] += A[16, k] * B[k, 8], fp32 sums.
//
// Lane l = 4 g + q (g = 0..7, q = 0..3) holds, two 16-bit elements a register, the lower column
// (A) or row (B) in the lower half:
//
//   k = 16, 16-bit      a0 A[g, 2q..]    a1 A[g+8, 2q..]   a2 A[g, 2q+8..]   a3 A[g+8, 2q+8..]
//                       b0 B[2q.., g]    b1 B[2q+8.., g]
//   k = 8, tf32         a0 A[g, q]       a1 A[g+8, q]      a2 A[g, q+4]      a3 A[g+8, q+4]
//                       b0 B[q, g]       b1 B[q+4, g]
//   both                d0 D[g, 2q]      d1 D[g, 2q+1]     d2 D[g+8, 2q]     d3 D[g+8, 2q+1]
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace halfbyte::cuda {

template <class Element>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The operands are fp32 bit patterns out of round_to_tf32.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// To 11 significant bits, a tie away from zero, the exponent range of fp32. Exact for what came
// from bf16 and fp16.
__device__ __forceinline__ float round_to_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return __uint_as_float(rounded);
}

}  // namespace halfbyte::cuda
