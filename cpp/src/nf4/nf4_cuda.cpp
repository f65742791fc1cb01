// Hands checked quantize, double quantize and dequantize calls to the CUDA library.
#include "nf4_cuda.h"

#include "support/cuda_library.h"

namespace halfbyte {

void quantize_4bit_cuda(const QuantizeParams& params) {
  int64_t bad_index = -1;
  cuda::QuantizeLaunch launch{};
  launch.weight = cuda_operand(params.weight);
  launch.count = params.weight.numel();
  launch.block_size = static_cast<int>(params.block_size);
  launch.codebook = params.codebook;
  launch.packed = params.packed.as<uint8_t>();
  launch.absmax = params.absmax.as<float>();
  launch.bad_index = &bad_index;
  check_cuda("quantize_4bit",
             cuda_api().quantize_4bit(launch, cuda_where(params.weight, params.stream)));
  HALFBYTE_CHECK(bad_index < 0,
                 "weight: expected finite values, got a non-finite one at flat index ", bad_index,
                 " of ", describe(params.weight));
}

void double_quantize_cuda(const DoubleQuantizeParams& params) {
  cuda::DoubleQuantizeLaunch launch{};
  launch.absmax = params.absmax.as<float>();
  launch.blocks = params.absmax.numel();
  launch.offset = params.offset.as<float>();
  launch.codes = params.codes.as<uint8_t>();
  launch.nested_absmax = params.nested_absmax.as<float>();
  check_cuda("double_quantize",
             cuda_api().double_quantize(launch, cuda_where(params.absmax, params.stream)));
}

void dequantize_4bit_cuda(const DequantizeParams& params, const Nf4Bits& bits) {
  const cuda::DequantizeLaunch launch{{bits, params.weight.codebook}, cuda_operand(params.out)};
  check_cuda("dequantize_4bit",
             cuda_api().dequantize_4bit(launch, cuda_where(params.out, params.stream)));
}

}  // namespace halfbyte
