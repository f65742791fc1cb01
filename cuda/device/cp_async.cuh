// Copies from global to shared memory that run while the thread goes on.
//
// A thread issues copies, closes them into a group with commit, and waits until at most n of its
// newest groups are in flight. What other threads copied is visible only after their wait and a
// barrier.
#pragma once

#include <stdint.h>

namespace halfbyte::cuda {

// 16 bytes, both addresses 16-byte aligned; zeros when not `valid`, and `global` is not read then.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kInFlight>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

}  // namespace halfbyte::cuda
