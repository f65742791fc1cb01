// The rows of the variant tables in nf4.cu.
#pragma once

#include "halfbyte/cuda/api.h"

namespace halfbyte::cuda {

// One warp a span of blocks; finds the first non-finite element on the way.
const char* quantize_sm80(const QuantizeLaunch& launch, Where where);
const char* double_quantize_sm80(const DoubleQuantizeLaunch& launch, Where where);

// Tiles of 1,024 elements, 16-byte loads and stores; packed and out must be 16-byte aligned.
const char* dequantize_sm80(const DequantizeLaunch& launch, Where where);
// A byte a thread, at any address.
const char* dequantize_portable(const DequantizeLaunch& launch, Where where);

}  // namespace halfbyte::cuda
