// Blockwise 4-bit quantization (NF4, FP4, INT4) and its double-quantized scales.
//
//   absmax[b] = max |w[i]| over block b
//   x[i]      = w[i] * (1 / absmax[b])                 fp32, reciprocal first
//   code[i]   = code_of_rank[#{t : x[i] > threshold[t]}]
//
// An all-zero block has absmax 0 and the code of zero. Where 1 / absmax overflows (a subnormal
// absmax) both factors are scaled by 2^100 first, so codes stay right. A non-finite input is an
// error that names the first bad index. Number formats: codebook.h, nf4_format.h,
// dynamic8_format.h.
#pragma once

#include <vector>

#include "halfbyte/codebook.h"
#include "halfbyte/nf4_format.h"
#include "halfbyte/tensor_view.h"
#include "halfbyte/variant.h"

namespace halfbyte {

constexpr int64_t kMinBlockSize = 32;
constexpr int64_t kMaxBlockSize = 4096;

struct QuantizeParams {
  TensorView weight;  // any shape; float32, bfloat16 or float16
  CodebookId codebook = CodebookId::kNf4;
  int64_t block_size = 64;  // a power of two, 32 .. 4096
  TensorView packed;        // uint8 [ceil(count / 2)]
  TensorView absmax;        // float32 [ceil(count / block_size)]
  int threads = 1;
  void* stream = nullptr;  // CUDA: the stream to run on
};
void quantize_4bit(const QuantizeParams& params);

// codes[b], nested_absmax[b / 256] from absmax[b] - offset: the signed 8-bit dynamic map, nearest
// code, blocks of 256. `offset` is the mean of absmax, chosen by the caller.
struct DoubleQuantizeParams {
  TensorView absmax;         // float32 [blocks]
  TensorView offset;         // float32 [1]
  TensorView codes;          // uint8 [blocks]
  TensorView nested_absmax;  // float32 [ceil(blocks / 256)]
  int threads = 1;
  void* stream = nullptr;
};
void double_quantize(const DoubleQuantizeParams& params);

// A packed weight as tensors. `absmax` is float32 (single) or uint8 (double-quantized, with
// nested_absmax and offset given). Tables that are not given are the standard ones; a checkpoint's
// own tables are honoured as stored.
struct QuantizedView {
  TensorView packed;         // uint8 [ceil(count / 2)], any shape of that size
  TensorView absmax;         // float32 or uint8 [ceil(count / block_size)]
  TensorView nested_absmax;  // float32 [ceil(blocks / 256)]
  TensorView offset;         // float32 [1]
  CodebookId codebook = CodebookId::kNf4;
  TensorView levels;      // float32 [16]; not given: the code book's
  TensorView nested_map;  // float32 [256]; not given: the signed dynamic map
  int64_t block_size = 64;
};
// Checks every part against `count` elements, and that all lie at `place`, where the tensor called
// `first` is; returns the kernels' plain view. On CUDA, tables that are not given stay null: the
// CUDA library has its own.
Nf4Bits checked_bits(const QuantizedView& weight, int64_t count, const char* first = "the call",
                     const Place& place = {});

struct DequantizeParams {
  QuantizedView weight;
  // float32, bfloat16 or float16, `count` elements: fp32 product, rounded to nearest
  TensorView out;
  int threads = 1;
  void* stream = nullptr;
};
void dequantize_4bit(const DequantizeParams& params);

// The 16 levels of a code book as fp32.
std::vector<float> codebook_levels(CodebookId codebook);
CodebookId codebook_by_name(const std::string& name);

std::vector<VariantStatus> quantize_variants();
std::vector<VariantStatus> dequantize_variants();

}  // namespace halfbyte
