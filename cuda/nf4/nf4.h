// 4-bit quantization, its double-quantized scales and dequantization on CUDA: what api.cu offers.
// Formats and formulas: halfbyte/nf4_format.h, codebook.h, dynamic8_format.h. Every result has the
// bits of the CPU's reference.
#pragma once

#include "halfbyte/cuda/api.h"

namespace halfbyte::cuda {

const char* quantize_4bit(const QuantizeLaunch& launch, Where where);
const char* double_quantize(const DoubleQuantizeLaunch& launch, Where where);
const char* dequantize_4bit(const DequantizeLaunch& launch, Where where);

bool quantize_variant(int row, int device, VariantRow* out);
bool dequantize_variant(int row, int device, VariantRow* out);

}  // namespace halfbyte::cuda
