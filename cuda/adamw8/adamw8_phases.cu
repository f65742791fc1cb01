// The light phases of a step: is every gradient finite, and one more step done.
//
//   bad = min over non-finite elements of (tensor << 40 | index), -1 (the largest unsigned) if none
//   step += 1 for every tensor unless bad is set
//
// Layout: gradients are cut into pieces of 2,048 elements; a block of threads owns a contiguous
// range of pieces, whose warps take turns. A warp walks up and stops at its first find, so that the
// least of the reports is the first of all and there is at most one a warp.
//
// An exponent of all ones is what infinities and NaNs share: (word & mask) + one carries into the
// top bit of each element exactly then; two elements of 16 bits are tested at once. 16 bytes a lane
// and load, four loads under way.
#include "adamw8/adamw8_impl.h"
#include "device/elements.cuh"
#include "device/error.h"
#include "device/launch.h"
#include "device/reduce.cuh"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kBlocksPerMultiprocessor = 4;

struct ExponentTest {
  uint32_t mask, one, carry;
};

__device__ __forceinline__ ExponentTest exponent_test(DType dtype) {
  if (dtype == DType::kFloat32) return {0x7F800000u, 0x00800000u, 0x80000000u};
  if (dtype == DType::kBFloat16) return {0x7F807F80u, 0x00800080u, 0x80008000u};
  return {0x7C007C00u, 0x04000400u, 0x80008000u};
}

__device__ __forceinline__ uint32_t carries(const ExponentTest& test, const uint4& words) {
  const uint32_t low = ((words.x & test.mask) + test.one) | ((words.y & test.mask) + test.one);
  const uint32_t high = ((words.z & test.mask) + test.one) | ((words.w & test.mask) + test.one);
  return (low | high) & test.carry;
}

// Whether a whole, aligned piece from element `begin` holds a non-finite element, for the warp.
__device__ __forceinline__ bool piece_is_bad(const GradientEntry& entry, int64_t begin) {
  const ExponentTest test = exponent_test(entry.dtype);
  const int bytes = element_bytes(entry.dtype);
  const uint4* words =
      reinterpret_cast<const uint4*>(static_cast<const char*>(entry.grad) + begin * bytes);
  const int loads = static_cast<int>(kGradientPiece) * bytes / (16 * kLanes);  // a lane: 8 or 16
  uint32_t bad = 0;
  for (int i = 0; i < loads; i += 4) {
    uint4 loaded[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) loaded[j] = words[(i + j) * kLanes + threadIdx.x % kLanes];
#pragma unroll
    for (int j = 0; j < 4; ++j) bad |= carries(test, loaded[j]);
  }
  return __any_sync(kFullWarp, bad != 0);
}

__device__ __forceinline__ bool is_bad(const GradientEntry& entry, int64_t index) {
  const ExponentTest test = exponent_test(entry.dtype);
  const uint32_t word = entry.dtype == DType::kFloat32
                            ? static_cast<const uint32_t*>(entry.grad)[index]
                            : static_cast<const uint16_t*>(entry.grad)[index];
  return ((word & test.mask) + test.one & test.carry) != 0;
}

// The first non-finite index in [begin, end), or -1, for the warp.
__device__ __forceinline__ int64_t first_bad(const GradientEntry& entry, int64_t begin,
                                             int64_t end) {
  for (; begin < end; begin += kLanes) {
    const int64_t index = begin + threadIdx.x % kLanes;
    const unsigned found = __ballot_sync(kFullWarp, index < end && is_bad(entry, index));
    if (found) return begin + __ffs(static_cast<int>(found)) - 1;
  }
  return -1;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    check_gradients_kernel(const __grid_constant__ GradientBatch batch) {
  const int64_t pieces = batch.first_piece[batch.tensors];
  const int64_t end = pieces * (blockIdx.x + 1) / gridDim.x;
  int64_t piece = pieces * blockIdx.x / gridDim.x + threadIdx.x / kLanes;
  if (piece >= end) return;
  int i = find_entry(batch.first_piece, batch.tensors, piece);
  for (; piece < end; piece += kWarps) {
    while (piece >= batch.first_piece[i + 1]) ++i;
    const GradientEntry& entry = batch.entries[i];
    const int64_t begin = (piece - batch.first_piece[i]) * kGradientPiece;
    const int64_t left = entry.count - begin;
    const bool whole = entry.aligned && left >= kGradientPiece;
    if (whole && !piece_is_bad(entry, begin)) continue;
    const int64_t found =
        first_bad(entry, begin, left < kGradientPiece ? entry.count : begin + kGradientPiece);
    if (found < 0) continue;
    if (threadIdx.x % kLanes == 0)
      atomicMin(batch.bad, static_cast<unsigned long long>(entry.tensor << 40 | found));
    return;
  }
}

__global__ void clear_bad_kernel(unsigned long long* bad) {
  *bad = kNothingBad;
}

__global__ void __launch_bounds__(kThreads)
    count_step_kernel(const __grid_constant__ StepBatch batch) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < batch.tensors && *batch.bad == kNothingBad) *batch.steps[i] += 1.0f;
}

}  // namespace

const char* launch_clear_bad(unsigned long long* bad, cudaStream_t stream) {
  clear_bad_kernel<<<1, 1, 0, stream>>>(bad);
  return launched("adamw8: clear_bad");
}

const char* launch_check_gradients(const GradientBatch& batch, cudaStream_t stream) {
  const unsigned grid =
      grid_size(batch.first_piece[batch.tensors], kWarps, kBlocksPerMultiprocessor);
  check_gradients_kernel<<<grid, kThreads, 0, stream>>>(batch);
  return launched("adamw8: check_gradients");
}

const char* launch_count_step(const StepBatch& batch, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(ceil_div(batch.tensors, kThreads));
  count_step_kernel<<<grid, kThreads, 0, stream>>>(batch);
  return launched("adamw8: count_step");
}

}  // namespace halfbyte::cuda
