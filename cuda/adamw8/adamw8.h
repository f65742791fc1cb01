// One step of 8-bit AdamW over many tensors on CUDA, and its three phases for callers that put work
// of their own between them (memory/paged_adamw8.cu does). All of them only enqueue on the stream.
// Arithmetic: halfbyte/adamw8_format.h, bit for bit.
#pragma once

#include "halfbyte/cuda/api.h"

namespace halfbyte::cuda {

// The three phases in order.
const char* adamw8_step(const AdamW8Launch& launch, Where where);

// Phase 1: *launch.bad = -1, or (tensor << 40 | index) of the first non-finite gradient element.
const char* adamw8_check_gradients(const AdamW8Launch& launch, Where where);
// Phase 2: parameters and moments of `count` tensors, which may be copies of the launch's with
// other addresses. Nothing changes where *launch.bad is set.
const char* adamw8_update(const AdamW8Launch& launch, const AdamW8Tensor* tensors, int64_t count,
                          Where where);
// Phase 3: every tensor's step counter plus one, unless *launch.bad is set.
const char* adamw8_count_step(const AdamW8Launch& launch, Where where);

bool adamw8_variant(int row, int device, VariantRow* out);

}  // namespace halfbyte::cuda
