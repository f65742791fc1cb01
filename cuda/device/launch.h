// How many blocks of threads a kernel that strides over its work starts.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

namespace halfbyte::cuda {

constexpr int kLanes = 32;  // threads of a warp

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Enough for `work` items at `per_block` a block, no more than fit on the current device at once: a
// block that started after the others would find its share of the work waiting. The kernel's launch
// bounds promise `blocks_per_multiprocessor`; six of 256 threads fill the smallest multiprocessor.
inline unsigned grid_size(int64_t work, int64_t per_block, int blocks_per_multiprocessor) {
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t resident = static_cast<int64_t>(multiprocessors) * blocks_per_multiprocessor;
  const int64_t wanted = ceil_div(work, per_block);
  return static_cast<unsigned>(wanted < resident ? wanted : resident);
}

inline bool is_aligned(const void* address, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

}  // namespace halfbyte::cuda
