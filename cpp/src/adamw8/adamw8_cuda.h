// The way of a checked step on CUDA tensors into the CUDA library.
#pragma once

#include "halfbyte/adamw8.h"

namespace halfbyte {

void adamw8_step_cuda(const AdamW8Params& params);

}  // namespace halfbyte
