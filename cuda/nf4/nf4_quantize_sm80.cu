// Blockwise 4-bit quantization.
//
//   absmax[b] = max |w[i]| over block b
//   x[i]      = w[i] * lift * (1 / (absmax[b] * lift))       lift: 2^100 where 1 / absmax overflows
//   code[i]   = code_of_rank[#{t : x[i] > threshold[t]}]     first element in the high nibble
//
// Layout: a warp takes a span of 256 elements, eight neighbours a lane, or one whole block where
// blocks are larger. Blocks of 32 .. 128 are reduced among 4 .. 16 lanes by shuffles; a block above
// 256 is read twice, the second time out of the caches. No warp waits for another.
//
// A lane's eight elements are 16 bytes in and 4 bytes out, whole warps contiguous; the 15
// thresholds lie in 15 banks of shared memory, so that a search of four steps has no conflicts.
//
// Invariants: elements past the end count as 0, which is the pad nibble's code. A warp walks up
// through the tensor and stops at its first non-finite element, so that the least of the reports is
// the first of all; what was written by then is unspecified, as the call is an error.
#include <mutex>

#include "device/elements.cuh"
#include "device/launch.h"
#include "device/reduce.cuh"
#include "nf4/nf4_impl.h"
#include "device/error.h"

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 6;
constexpr int kSpan = kLanes * kLaneElements;
constexpr float kLargestFloat = 3.402823466e38f;
constexpr float kLift = 1.2676506002282294e30f;  // 2^100

struct QuantizeArgs {
  const void* weight;
  DType dtype;
  int64_t count;
  int block_shift;
  bool aligned;           // weight to 16 bytes and packed to 4
  uint64_t code_of_rank;  // sixteen nibbles, rank 0 lowest
  uint32_t thresholds[15];
  uint8_t* packed;
  float* absmax;
  unsigned long long* bad_index;
};

// This lane's elements index .. index + 7; zeros past the end.
__device__ __forceinline__ void load_elements(const QuantizeArgs& args, int64_t index,
                                              float values[8]) {
  const int bytes = element_bytes(args.dtype);
  const int64_t left = args.count - index;
  const Raw8 raw = args.aligned && left >= kLaneElements
                       ? load_whole(args.weight, bytes, index)
                       : load_some(args.weight, bytes, index,
                                   static_cast<int>(left < 0   ? 0
                                                    : left < 8 ? left
                                                               : 8));
  to_floats(raw, args.dtype, values);
}

// The largest magnitude of the span's block that this lane is in; negative when an element is not
// finite, which has been reported then.
__device__ __forceinline__ float span_absmax(const QuantizeArgs& args, int64_t begin, int chunks,
                                             int group, float values[8]) {
  float largest = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int64_t index = begin + chunk * kSpan;
    load_elements(args, index, values);
    unsigned long long bad = ~0ull;
#pragma unroll
    for (int j = 7; j >= 0; --j) {
      const float magnitude = fabsf(values[j]);
      if (!(magnitude <= kLargestFloat)) bad = index + j;
      largest = fmaxf(largest, magnitude);
    }
    if (__any_sync(kFullWarp, bad != ~0ull)) {
      bad = warp_min(bad);
      if (threadIdx.x % kLanes == 0) atomicMin(args.bad_index, bad);
      return -1;
    }
  }
  return group_max(largest, group);
}

__device__ __forceinline__ uint32_t code_of(float x, const float thresholds[15], uint64_t codes) {
  int rank = 0;
#pragma unroll
  for (int step = 8; step > 0; step /= 2) rank += x > thresholds[rank + step - 1] ? step : 0;
  return static_cast<uint32_t>(codes >> 4 * rank) & 15u;
}

__device__ __forceinline__ void store_codes(const QuantizeArgs& args, int64_t index,
                                            uint32_t packed) {
  if (args.aligned && index + kLaneElements <= args.count) {
    *reinterpret_cast<uint32_t*>(args.packed + index / 2) = packed;
    return;
  }
#pragma unroll
  for (int byte = 0; byte < 4; ++byte)
    if (index + 2 * byte < args.count)
      args.packed[index / 2 + byte] = static_cast<uint8_t>(packed >> 8 * byte);
}

// False when the span holds a non-finite element.
__device__ __forceinline__ bool quantize_span(const QuantizeArgs& args, const float thresholds[15],
                                              int64_t begin, int chunks) {
  const int per_block = 1 << args.block_shift;
  const int group = per_block < kSpan ? per_block / kLaneElements : kLanes;
  float values[8];
  const float absmax = span_absmax(args, begin, chunks, group, values);
  if (absmax < 0) return false;
  if (threadIdx.x % group == 0 && begin < args.count)
    args.absmax[begin >> args.block_shift] = absmax;

  float lift = 1;
  float inverse = absmax > 0 ? __frcp_rn(absmax) : 0.0f;
  if (inverse > kLargestFloat) {
    lift = kLift;
    inverse = __frcp_rn(__fmul_rn(absmax, kLift));
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int64_t index = begin + chunk * kSpan;
    if (chunks > 1) load_elements(args, index, values);
    uint32_t packed = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float x = __fmul_rn(__fmul_rn(values[j], lift), inverse);
      packed |= code_of(x, thresholds, args.code_of_rank) << (8 * (j / 2) + (j % 2 ? 0 : 4));
    }
    store_codes(args, index, packed);
  }
  return true;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    quantize_4bit_kernel(const __grid_constant__ QuantizeArgs args) {
  __shared__ float thresholds[15];
  if (threadIdx.x < 15) thresholds[threadIdx.x] = __uint_as_float(args.thresholds[threadIdx.x]);
  __syncthreads();

  const int chunks = args.block_shift > 8 ? 1 << (args.block_shift - 8) : 1;
  const int64_t span = static_cast<int64_t>(chunks) * kSpan;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
  int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  for (; warp * span < args.count; warp += warps)
    if (!quantize_span(args, thresholds, warp * span + lane * kLaneElements, chunks)) return;
}

// Words of pinned memory that kernels write a bad index to: one allocation a process, no wait and
// no copy to read one.
class BadIndexSlot {
 public:
  BadIndexSlot() {
    const std::lock_guard<std::mutex> lock(mutex());
    static unsigned long long* slots = nullptr;
    if (!slots)
      problem_ = failed(cudaHostAlloc(reinterpret_cast<void**>(&slots), kSlots * sizeof(*slots),
                                      cudaHostAllocPortable),
                        "cudaHostAlloc");
    while (!problem_ && index_ < kSlots && (taken() >> index_ & 1)) ++index_;
    if (!problem_ && index_ == kSlots)
      problem_ = say("quantize_4bit: %d calls are under way at once", kSlots);
    if (problem_) return;
    taken() |= 1ull << index_;
    slot_ = slots + index_;
    *slot_ = ~0ull;
  }
  ~BadIndexSlot() {
    if (!slot_) return;
    const std::lock_guard<std::mutex> lock(mutex());
    taken() &= ~(1ull << index_);
  }
  BadIndexSlot(const BadIndexSlot&) = delete;
  BadIndexSlot& operator=(const BadIndexSlot&) = delete;

  const char* problem() const { return problem_; }
  unsigned long long* get() const { return slot_; }

 private:
  static constexpr int kSlots = 64;
  static std::mutex& mutex() {
    static std::mutex guard;
    return guard;
  }
  static uint64_t& taken() {
    static uint64_t bits = 0;
    return bits;
  }
  const char* problem_ = nullptr;
  unsigned long long* slot_ = nullptr;
  int index_ = 0;
};

QuantizeArgs make_args(const QuantizeLaunch& launch, unsigned long long* bad_index) {
  const Codebook& book = kCodebooks[static_cast<int>(launch.codebook)];
  QuantizeArgs args{};
  args.weight = launch.weight.data;
  args.dtype = launch.weight.dtype;
  args.count = launch.count;
  while ((1 << args.block_shift) < launch.block_size) ++args.block_shift;
  args.aligned = is_aligned(launch.weight.data, 16) && is_aligned(launch.packed, 4);
  for (int i = 0; i < 15; ++i) args.thresholds[i] = book.thresholds[i];
  for (int i = 0; i < 16; ++i)
    args.code_of_rank |= static_cast<uint64_t>(book.code_of_rank[i]) << 4 * i;
  args.packed = launch.packed;
  args.absmax = launch.absmax;
  args.bad_index = bad_index;
  return args;
}

}  // namespace

const char* quantize_sm80(const QuantizeLaunch& launch, Where where) {
  const auto stream = static_cast<cudaStream_t>(where.stream);
  const BadIndexSlot bad_index;
  if (bad_index.problem()) return bad_index.problem();
  const int64_t span = launch.block_size > kSpan ? launch.block_size : kSpan;
  const unsigned grid =
      grid_size(ceil_div(launch.count, span), kThreads / kLanes, kBlocksPerMultiprocessor);
  quantize_4bit_kernel<<<grid, kThreads, 0, stream>>>(make_args(launch, bad_index.get()));
  const char* problem = launched("quantize_4bit");
  if (*problem) return problem;
  problem = failed(cudaStreamSynchronize(stream), "quantize_4bit");
  if (problem) return problem;
  *launch.bad_index = static_cast<int64_t>(*bad_index.get());
  return kOk;
}

}  // namespace halfbyte::cuda
