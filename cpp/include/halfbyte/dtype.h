// The element types that cross the core's border. Plain C, shared by kernels and CUDA.
#pragma once

// For functions that kernels on the device share with the host.
#ifdef __CUDACC__
#define HALFBYTE_HOST_DEVICE __host__ __device__
#else
#define HALFBYTE_HOST_DEVICE
#endif

namespace halfbyte {

enum class DType { kFloat32, kBFloat16, kFloat16, kUInt8, kInt64 };

}  // namespace halfbyte
