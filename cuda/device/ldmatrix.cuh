// Four 8 x 8 matrices of 16-bit elements from shared memory into the registers of a warp.
//
// Lanes 8 i .. 8 i + 7 give the addresses of the eight 16-byte rows of matrix i; lane 4 g + q
// receives elements 2 q and 2 q + 1 of row g of matrix i in out[i]: what mma_m16n8k16 wants.
#pragma once

#include <stdint.h>

namespace halfbyte::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// The same of matrices whose rows become columns: elements 2 q and 2 q + 1 of COLUMN g.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

}  // namespace halfbyte::cuda
