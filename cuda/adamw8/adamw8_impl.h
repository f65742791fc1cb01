// What the phases of a step take: batches of tensor descriptions, each one kernel parameter of at
// most 32,764 bytes, so that no memory on the device is allocated, copied to or waited for, and a
// captured CUDA graph holds all it needs.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "halfbyte/cuda/api.h"

namespace halfbyte::cuda {

constexpr size_t kLargestParameter = 32764;

// --- phase 1
// --------------------------------------------------------------------------------------

struct GradientEntry {
  const void* grad;
  int64_t count;
  int64_t tensor;  // row of AdamW8Launch::tensors
  DType dtype;
  bool aligned;  // to 16 bytes
};

// Gradients are cut into pieces of kGradientPiece elements; first_piece is the running sum.
constexpr int64_t kGradientPiece = 2048;
struct GradientBatch {
  static constexpr int kTensors = 800;
  int64_t tensors;
  unsigned long long* bad;
  int64_t first_piece[kTensors + 1];
  GradientEntry entries[kTensors];
};
static_assert(sizeof(GradientBatch) <= kLargestParameter, "one kernel parameter");

// --- phase 2
// --------------------------------------------------------------------------------------

struct UpdateEntry {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  float* exp_avg_absmax;
  float* exp_avg_sq_absmax;
  const float* step;
  int64_t count;
  uint8_t param_dtype, grad_dtype, state;  // DType, DType, AdamW8State
  bool aligned;                            // every address fits whole vectors
  int32_t group;                           // of this batch
};

// first_block: running sum of ceil(count / 256).
struct UpdateBatch {
  static constexpr int kTensors = 380;
  static constexpr int kGroups = 45;
  int64_t tensors;
  const unsigned long long* bad;
  int64_t first_block[kTensors + 1];
  UpdateEntry entries[kTensors];
  AdamW8GroupLaunch groups[kGroups];
};
static_assert(sizeof(UpdateBatch) <= kLargestParameter, "one kernel parameter");

// --- phase 3
// --------------------------------------------------------------------------------------

struct StepBatch {
  static constexpr int kTensors = 4000;
  int64_t tensors;
  const unsigned long long* bad;
  float* steps[kTensors];
};
static_assert(sizeof(StepBatch) <= kLargestParameter, "one kernel parameter");

// --- launches
// -------------------------------------------------------------------------------------

constexpr unsigned long long kNothingBad = ~0ull;  // -1 as the caller reads it

const char* launch_clear_bad(unsigned long long* bad, cudaStream_t stream);
const char* launch_check_gradients(const GradientBatch& batch, cudaStream_t stream);
const char* launch_update_sm80(const UpdateBatch& batch, cudaStream_t stream);
const char* launch_count_step(const StepBatch& batch, cudaStream_t stream);

// The entry whose range of the running sum `first` holds `at`: first[entry] <= at < first[entry+1].
__host__ __device__ inline int find_entry(const int64_t* first, int64_t entries, int64_t at) {
  int low = 0, high = static_cast<int>(entries);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first[middle] <= at ? low : high) = middle;
  }
  return low;
}

}  // namespace halfbyte::cuda
