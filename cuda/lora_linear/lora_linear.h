// The LoRA linear on a packed 4-bit weight: the entry points behind halfbyte/cuda/api.h.
#pragma once

#include <stdint.h>

#include "halfbyte/cuda/api.h"

namespace halfbyte::cuda {

int64_t lora_linear_forward_workspace(const ForwardLaunch& launch, Where where);
int64_t lora_linear_backward_workspace(const BackwardLaunch& launch, Where where);
const char* lora_linear_forward(const ForwardLaunch& launch, Where where);
const char* lora_linear_backward(const BackwardLaunch& launch, Where where);
bool lora_linear_variant(int row, int device, VariantRow* out);

}  // namespace halfbyte::cuda
