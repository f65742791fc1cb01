// The way of checked calls on CUDA tensors into the CUDA library.
#pragma once

#include "halfbyte/lora_linear.h"
#include "lora_linear_impl.h"

namespace halfbyte {

int64_t lora_linear_forward_workspace_cuda(const LoraLinearParams& params, const ForwardArgs& args);
int64_t lora_linear_backward_workspace_cuda(const LoraLinearBackwardParams& params,
                                            const BackwardArgs& args);
void lora_linear_forward_cuda(const LoraLinearParams& params, const ForwardArgs& args);
void lora_linear_backward_cuda(const LoraLinearBackwardParams& params, const BackwardArgs& args);

}  // namespace halfbyte
