// Parameters and moments of one step, for several hundred tensors in one launch.
//
//   decode m, v
//   m = b1 m + c1 g,  v = b2 v + (c2 g) g,  p = p decay - size m / (sqrt(v) root + eps)
//   encode m, v                                         the contract: halfbyte/adamw8_format.h
//
// Layout: a warp owns a state block of 256 elements, eight neighbours a lane: 16 bytes of a 2-byte
// type, 8 bytes of codes, a load each. The blocks of all tensors form one list; a block of threads
// owns a contiguous part of it, whose warps take turns.
//
// Invariants: every operation is rounded on its own (the _rn intrinsics are never fused); elements
// past a tensor's end count as zeros and are not stored; nothing is stored when `bad` is set. The
// fp64 scalars of each tensor are computed from its step counter, one thread a tensor; this file
// is compiled with -fmad=false, so that they have the host's bits.
//
// Why it is fast: every byte of state moves once, all loads of a block are issued before the first
// is used; absmax takes one warp instruction and no barrier; encoding is one look-up and one
// compare (device/dynamic8.cuh), not a search.
#include "adamw8/adamw8_impl.h"
#include "device/dynamic8.cuh"
#include "device/elements.cuh"
#include "device/error.h"
#include "device/launch.h"
#include "device/reduce.cuh"

namespace halfbyte::cuda {
namespace {

// Two blocks of 12 warps leave 80 registers a thread: nothing spills.
constexpr int kThreads = 384;
constexpr int kWarps = kThreads / kLanes;
constexpr int kBlocksPerMultiprocessor = 2;
static_assert(UpdateBatch::kTensors <= kThreads, "one thread computes one tensor's scalars");

struct Tables {
  SignedBinPair signed_bins;
  UnsignedBins unsigned_bins;
  Dynamic8Map signed_map, unsigned_map;
};

// Which of a tensor's elements a lane holds.
struct LaneRange {
  int64_t begin;
  int count;   // 0 .. 8
  bool whole;  // moves as vectors
};

__device__ __forceinline__ Raw8 load(const void* data, int bytes, const LaneRange& range) {
  return range.whole ? load_whole(data, bytes, range.begin)
                     : load_some(data, bytes, range.begin, range.count);
}

__device__ __forceinline__ void store(void* data, int bytes, const LaneRange& range,
                                      const Raw8& raw) {
  if (range.whole) {
    store_whole(data, bytes, range.begin, raw);
  } else {
    store_some(data, bytes, range.begin, range.count, raw);
  }
}

// --- decode
// ---------------------------------------------------------------------------------------

struct RawMoments {
  Raw8 m, v;
  float m_scale, v_scale;  // of 8-bit state
};

// Elements past the end: code 0 is zero in the unsigned map only.
__device__ __forceinline__ void clear_codes(Raw8& codes, int count) {
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (j >= count) codes.word[j / 4] |= static_cast<uint32_t>(kDynamic8SignedZero) << 8 * (j % 4);
}

__device__ __forceinline__ void decode_moments(const RawMoments& raw, AdamW8State state,
                                               const Tables& tables, float m[8], float v[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (state == AdamW8State::kFloat32) {
      m[j] = __uint_as_float(raw.m.word[j]);
      v[j] = __uint_as_float(raw.v.word[j]);
      continue;
    }
    m[j] = __fmul_rn(decode8(tables.signed_map, byte_of(raw.m, j)), raw.m_scale);
    v[j] = __fmul_rn(decode8(tables.unsigned_map, byte_of(raw.v, j)), raw.v_scale);
    if (state == AdamW8State::kRatio) {
      m[j] = __fmul_rn(m[j], v[j]);
      v[j] = __fmul_rn(v[j], v[j]);
    }
  }
}

// --- step
// -----------------------------------------------------------------------------------------

__device__ __forceinline__ void step_elements(const AdamW8Scalars& k, const float g[8], float p[8],
                                              float m[8], float v[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    m[j] = __fadd_rn(__fmul_rn(k.b1, m[j]), __fmul_rn(k.c1, g[j]));
    v[j] = __fadd_rn(__fmul_rn(k.b2, v[j]), __fmul_rn(__fmul_rn(k.c2, g[j]), g[j]));
    const float d = __fadd_rn(__fmul_rn(__fsqrt_rn(v[j]), k.root), k.eps);
    const float q = d == 0 ? 0.0f : __fdiv_rn(m[j], d);
    p[j] = __fsub_rn(__fmul_rn(p[j], k.decay), __fmul_rn(k.size, q));
  }
}

// --- encode
// ---------------------------------------------------------------------------------------

// absmax of the warp's block as it is stored, and its reciprocal.
__device__ __forceinline__ float block_scale(const float values[8], float cap, float* inverse) {
  float largest = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(values[j]));
  largest = warp_max_magnitude(largest);
  const float scale = largest == 0 ? 0.0f : fminf(fmaxf(largest, kSmallestScale), cap);
  *inverse = scale == 0 ? 0.0f : __frcp_rn(scale);
  return scale;
}

__device__ __forceinline__ float encode_signed(const SignedBinPair& bins, const float values[8],
                                               Raw8& codes) {
  float inverse;
  const float scale = block_scale(values, kLargestFloat, &inverse);
#pragma unroll
  for (int j = 0; j < 8; ++j)
    codes.word[j / 4] |= encode8_signed(bins, __fmul_rn(values[j], inverse)) << 8 * (j % 4);
  return scale;
}

__device__ __forceinline__ float encode_unsigned(const UnsignedBins& bins, const float values[8],
                                                 float cap, Raw8& codes) {
  float inverse;
  const float scale = block_scale(values, cap, &inverse);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t code = encode8_nonzero(bins, __fmul_rn(values[j], inverse));
    codes.word[j / 4] |= (values[j] == 0 ? 0u : code) << 8 * (j % 4);
  }
  return scale;
}

__device__ __forceinline__ RawMoments encode_moments(float m[8], float v[8], AdamW8State state,
                                                     const Tables& tables) {
  RawMoments raw = {};
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (v[j] > kLargestFloat) m[j] = 0;
  float cap = kLargestFloat;
  if (state == AdamW8State::kRatio) {
    cap = kLargestRoot;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      v[j] = __fsqrt_rn(v[j]);
      m[j] = v[j] == 0 ? 0.0f : __fdiv_rn(m[j], v[j]);
    }
  }
  raw.v_scale = encode_unsigned(tables.unsigned_bins, v, cap, raw.v);
  raw.m_scale = encode_signed(tables.signed_bins, m, raw.m);
  return raw;
}

__device__ __forceinline__ Raw8 bits_of(const float values[8]) {
  Raw8 raw;
#pragma unroll
  for (int j = 0; j < 8; ++j) raw.word[j] = __float_as_uint(values[j]);
  return raw;
}

// --- one block of state
// ---------------------------------------------------------------------------

__device__ __forceinline__ void update_block(const UpdateEntry& t, const AdamW8Scalars& k,
                                             const Tables& tables, int64_t block) {
  const int lane = threadIdx.x % kLanes;
  LaneRange range;
  range.begin = block * kAdamW8Block + lane * kLaneElements;
  const int64_t left = t.count - range.begin;
  range.count = static_cast<int>(left < 0 ? 0 : left < 8 ? left : 8);
  range.whole = t.aligned && (block + 1) * kAdamW8Block <= t.count;  // for all lanes alike

  const auto param_dtype = static_cast<DType>(t.param_dtype);
  const auto grad_dtype = static_cast<DType>(t.grad_dtype);
  const auto state = static_cast<AdamW8State>(t.state);
  const bool coded = state != AdamW8State::kFloat32;
  const int state_bytes = coded ? 1 : 4;

  const Raw8 raw_grad = load(t.grad, element_bytes(grad_dtype), range);
  const Raw8 raw_param = load(t.param, element_bytes(param_dtype), range);
  RawMoments raw = {};
  raw.m = load(t.exp_avg, state_bytes, range);
  raw.v = load(t.exp_avg_sq, state_bytes, range);
  if (coded) {
    if (!range.whole) clear_codes(raw.m, range.count);
    raw.m_scale = t.exp_avg_absmax[block];
    raw.v_scale = t.exp_avg_sq_absmax[block];
  }

  float g[8], p[8], m[8], v[8];
  to_floats(raw_grad, grad_dtype, g);
  to_floats(raw_param, param_dtype, p);
  decode_moments(raw, state, tables, m, v);
  step_elements(k, g, p, m, v);
  store(t.param, element_bytes(param_dtype), range, from_floats(p, param_dtype));

  if (coded) {
    raw = encode_moments(m, v, state, tables);
    if (lane == 0) {
      t.exp_avg_absmax[block] = raw.m_scale;
      t.exp_avg_sq_absmax[block] = raw.v_scale;
    }
  } else {
    raw.m = bits_of(m);
    raw.v = bits_of(v);
  }
  store(t.exp_avg, state_bytes, range, raw.m);
  store(t.exp_avg_sq, state_bytes, range, raw.v);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    update_kernel(const __grid_constant__ UpdateBatch batch) {
  __shared__ __align__(16) Tables tables;
  __shared__ AdamW8Scalars scalars[UpdateBatch::kTensors];
  if (*batch.bad != kNothingBad) return;

  // This block's part of the list, and the tensors that it touches.
  const int64_t blocks = batch.first_block[batch.tensors];
  const int64_t begin = blocks * blockIdx.x / gridDim.x;
  const int64_t end = blocks * (blockIdx.x + 1) / gridDim.x;
  if (begin >= end) return;
  const int first = find_entry(batch.first_block, batch.tensors, begin);

  copy_table(kSignedBins, tables.signed_bins);
  copy_table(kUnsignedBins, tables.unsigned_bins);
  copy_table(kSignedMap, tables.signed_map);
  copy_table(kUnsignedMap, tables.unsigned_map);
  const int mine = first + static_cast<int>(threadIdx.x);
  if (mine < batch.tensors && batch.first_block[mine] < end) {
    const UpdateEntry& t = batch.entries[mine];
    const AdamW8GroupLaunch& group = batch.groups[t.group];
    scalars[threadIdx.x] =
        adamw8_scalars(group.lr, group.beta1, group.beta2, group.eps, group.weight_decay,
                       group.maximize, static_cast<int64_t>(*t.step) + 1);
  }
  __syncthreads();

  int i = first;
  for (int64_t at = begin + threadIdx.x / kLanes; at < end; at += kWarps) {
    while (at >= batch.first_block[i + 1]) ++i;
    update_block(batch.entries[i], scalars[i - first], tables, at - batch.first_block[i]);
  }
}

}  // namespace

const char* launch_update_sm80(const UpdateBatch& batch, cudaStream_t stream) {
  const unsigned grid =
      grid_size(batch.first_block[batch.tensors], kWarps, kBlocksPerMultiprocessor);
  update_kernel<<<grid, kThreads, 0, stream>>>(batch);
  return launched("adamw8: update");
}

}  // namespace halfbyte::cuda
