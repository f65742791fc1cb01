// The variant tables of quantize and dequantize on CUDA, and the choice by alignment.
#include "nf4/nf4.h"

#include "device/launch.h"
#include "device/variant.h"
#include "nf4/nf4_impl.h"

namespace halfbyte::cuda {
namespace {

const char* needs_alignment(const DequantizeLaunch& launch) {
  const bool aligned = is_aligned(launch.weight.bits.packed, 16) && is_aligned(launch.out.data, 16);
  return aligned ? kOk : "packed and out must start at multiples of 16 bytes";
}

const Variant<QuantizeLaunch> kQuantizeTable[] = {
    {"sm80", always, quantize_sm80},
};

const Variant<DequantizeLaunch> kDequantizeTable[] = {
    {"sm80", needs_alignment, dequantize_sm80},
    {"portable", always, dequantize_portable},
};

}  // namespace

const char* quantize_4bit(const QuantizeLaunch& launch, Where where) {
  *launch.bad_index = -1;
  if (launch.count == 0) return kOk;
  return run_selected("quantize_4bit", kQuantizeTable, launch, where);
}

const char* double_quantize(const DoubleQuantizeLaunch& launch, Where where) {
  return launch.blocks == 0 ? kOk : double_quantize_sm80(launch, where);
}

const char* dequantize_4bit(const DequantizeLaunch& launch, Where where) {
  if (launch.weight.bits.count == 0) return kOk;
  return run_selected("dequantize_4bit", kDequantizeTable, launch, where);
}

bool quantize_variant(int row, int, VariantRow* out) {
  return list_row("quantize_4bit", kQuantizeTable, QuantizeLaunch{}, row, out);
}

bool dequantize_variant(int row, int, VariantRow* out) {
  return list_row("dequantize_4bit", kDequantizeTable, DequantizeLaunch{}, row, out);
}

}  // namespace halfbyte::cuda
