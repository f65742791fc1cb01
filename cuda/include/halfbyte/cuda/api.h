// The border of the CUDA library, a shared object of its own that the core opens at first use.
//
// Plain structs in, a sentence out: "" is success, anything else the error, valid until the calling
// thread's next call. Nothing is thrown across the border, nothing is printed, nothing
// synchronises with the device unless it says so. The caller has checked dtypes and shapes
// (cpp/src/<op>/<op>.cpp does, for CPU and CUDA alike); every matrix is contiguous and row-major.
// Addresses are device addresses unless they say otherwise.
#pragma once

#include <stdint.h>

#include "halfbyte/adamw8_format.h"
#include "halfbyte/codebook.h"
#include "halfbyte/dtype.h"
#include "halfbyte/nf4_format.h"

namespace halfbyte::cuda {

// Raised by one when a struct below changes.
constexpr int kApiVersion = 1;

// Where a call runs: torch's current device and stream.
struct Where {
  int device;
  void* stream;  // cudaStream_t; null: the legacy default stream
};

// A contiguous row-major tensor whose shape the struct around it states. data null: not given.
struct Operand {
  void* data;
  DType dtype;  // float32, bfloat16 or float16
};

// A packed weight. bits.levels null: the code book's levels; bits.nested_map null: the signed
// dynamic map. Both standard tables live in the library as device constants.
struct Weight {
  Nf4Bits bits;
  CodebookId codebook;
};

struct QuantizeLaunch {
  Operand weight;  // [count]
  int64_t count;
  int block_size;
  CodebookId codebook;
  uint8_t* packed;     // out [ceil(count / 2)]
  float* absmax;       // out [blocks]
  int64_t* bad_index;  // HOST, out: the lowest index of a non-finite element, or -1
};

struct DoubleQuantizeLaunch {
  const float* absmax;  // [blocks]
  int64_t blocks;
  const float* offset;   // [1]
  uint8_t* codes;        // out [blocks]
  float* nested_absmax;  // out [ceil(blocks / 256)]
};

struct DequantizeLaunch {
  Weight weight;
  Operand out;  // [count]
};

// y = x W^T + bias + scaling * T B^T,  T = drop(x) A^T. R = 0: no LoRA branch.
struct ForwardLaunch {
  int64_t M, N, K, R;
  Operand x;       // [M, K] float32, bfloat16 or float16
  Weight weight;   // [N, K]
  Operand bias;    // [N] any float, or not given
  Operand lora_a;  // [R, K] any float
  Operand lora_b;  // [N, R] any float
  float scaling;
  const int64_t* seed;         // [1]; null: no dropout. mask: dropout_format.h
  uint32_t dropout_threshold;  // as in DropoutMask
  float dropout_scale;
  Operand y;        // out [M, N], x's dtype
  float* t;         // out [M, R]
  void* workspace;  // lora_linear_forward_workspace() bytes, 256-byte aligned
};

// dx = dy W + drop'(U A),  U = scaling * dy B,  dA = U^T drop(x),  dB = scaling * dy^T T,
// dbias = sum_m dy. Outputs that are not given are not computed.
struct BackwardLaunch {
  int64_t M, N, K, R;
  Operand dy;  // [M, N]
  Operand x;   // [M, K] dy's dtype; given with d_lora_a
  Weight weight;
  Operand lora_a, lora_b;
  const float* t;  // [M, R] from forward; given with d_lora_b
  float scaling;
  const int64_t* seed;
  uint32_t dropout_threshold;
  float dropout_scale;
  Operand dx;                  // out [M, K] dy's dtype
  Operand d_lora_a, d_lora_b;  // out [R, K], [N, R] any float
  Operand d_bias;              // out [N] any float
  void* workspace;             // lora_linear_backward_workspace() bytes, 256-byte aligned
};

// One step over all tensors, on the stream, without waiting for it. `tensors` and `groups` are HOST
// arrays and are read before the call returns; the addresses in a tensor, its `step` included, are
// device addresses. Gradients are looked at first: when one element is not finite, `bad` receives
// (tensor << 40 | index) of the lowest and nothing else changes; otherwise it keeps -1. `bad` is
// pinned host or device memory that outlives the launch, set to -1 by the call.
struct AdamW8GroupLaunch {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};
struct AdamW8Launch {
  const AdamW8Tensor* tensors;
  int64_t tensor_count;
  const AdamW8GroupLaunch* groups;
  int64_t group_count;
  int64_t* bad;
};

// --- pageable optimizer state
// ---------------------------------------------------------------------

enum class ArenaKind {
  kAuto,     // managed where the device can fault pages in, pinned elsewhere
  kManaged,  // cudaMallocManaged: pages move between device and host, addresses stay
  kPinned,   // pinned host memory, copied to a staging buffer on the device around each update
};
struct Arena;  // one allocation on one device, handed out in spans by the caller

// A span of tensors updated together: their state lies in [begin, end) of `arena`.
struct PageRange {
  Arena* arena;
  int64_t begin, end;                  // bytes
  int64_t first_tensor, tensor_count;  // of AdamW8Launch::tensors
};
struct PagedAdamW8Launch {
  AdamW8Launch step;
  const PageRange* pages;  // in the order of the update
  int64_t page_count;
  int64_t look_ahead;  // pages prefetched before the one that is updated
  bool evict;          // send each page back to the host after its update
};

struct VariantRow {
  const char* name;
  const char* why_not;  // "" when usable
  bool chosen;
};

struct Api {
  int version;
  // "" when a device can be used, otherwise a sentence. Asked once a process: a missing driver
  // stays missing.
  const char* (*why_not)();
  int (*device_count)();  // 0 when why_not() says something
  // "NVIDIA H100 80GB HBM3, compute capability 9.0, 79.1 GiB"
  const char* (*device_description)(int device);

  const char* (*quantize_4bit)(const QuantizeLaunch& launch, Where where);  // waits for the stream
  const char* (*double_quantize)(const DoubleQuantizeLaunch& launch, Where where);
  const char* (*dequantize_4bit)(const DequantizeLaunch& launch, Where where);

  int64_t (*lora_linear_forward_workspace)(const ForwardLaunch& launch, Where where);    // bytes
  int64_t (*lora_linear_backward_workspace)(const BackwardLaunch& launch, Where where);  // bytes
  const char* (*lora_linear_forward)(const ForwardLaunch& launch, Where where);
  const char* (*lora_linear_backward)(const BackwardLaunch& launch, Where where);
  // Row `row` of the op's table ("quantize_4bit", "dequantize_4bit", "lora_linear", "adamw8") for a
  // typical launch on `device`; false past the end.
  bool (*variant)(const char* op, int row, int device, VariantRow* out);

  const char* (*adamw8_step)(const AdamW8Launch& launch, Where where);
  const char* (*adamw8_paged_step)(const PagedAdamW8Launch& launch, Where where);

  const char* (*arena_create)(int64_t bytes, int device, ArenaKind kind, Arena** out);
  void (*arena_destroy)(Arena* arena);         // waits for the device's use of it
  void* (*arena_address)(const Arena* arena);  // readable and writable by the host after a wait
  ArenaKind (*arena_kind)(const Arena* arena);
  const char* (*arena_prefetch)(Arena* arena, int64_t begin, int64_t end, bool to_device,
                                Where where);
};

}  // namespace halfbyte::cuda

// The only exported symbol. Null when `version` is not kApiVersion.
extern "C" const halfbyte::cuda::Api* halfbyte_cuda_api(int version);
