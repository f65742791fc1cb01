// The way of checked calls on CUDA tensors into the CUDA library.
#pragma once

#include "halfbyte/nf4.h"

namespace halfbyte {

void quantize_4bit_cuda(const QuantizeParams& params);
void double_quantize_cuda(const DoubleQuantizeParams& params);
void dequantize_4bit_cuda(const DequantizeParams& params, const Nf4Bits& bits);

}  // namespace halfbyte
