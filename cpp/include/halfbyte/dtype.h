// The element types that cross the core's border. Plain C, shared by kernels and CUDA.
#pragma once

namespace halfbyte {

enum class DType { kFloat32, kBFloat16, kFloat16, kUInt8, kInt64 };

}  // namespace halfbyte
