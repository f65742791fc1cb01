// A linear layer on a packed 4-bit weight with an optional LoRA branch, forward and backward.
//
//   forward     T = drop(x) A^T                     y = x W^T + bias + s T B^T
//   backward    U = s dY B                          dX = dY W + drop'(U A)
//               dA = U^T drop(x)                    dB = s dY^T T          dbias = sum_m dY
//
//   x [M, K]   W [N, K] packed   bias [N]   A [R, K]   B [N, R]   y, dY [M, N]   T, U [M, R]
//
// W is decoded panel by panel into cache, never to memory: in bf16 for bf16 x, in fp32 for fp32 and
// fp16 x. Sums and T are fp32; a variant that multiplies bf16 pairs rounds its factors (A, s B, T,
// U) to bf16. `drop` is the counter-based mask of dropout_format.h over (m, k), `drop'` the same
// mask on the gradient. Results do not depend on the number of threads.
#pragma once

#include <vector>

#include "halfbyte/nf4.h"
#include "halfbyte/tensor_view.h"
#include "halfbyte/variant.h"

namespace halfbyte {

constexpr int64_t kMaxRank = 512;

struct LoraLinearParams {
  TensorView x;              // [M, K] float32, bfloat16 or float16
  QuantizedView weight;      // N * K elements
  int64_t out_features = 0;  // N
  TensorView bias;           // [N] any float, or not given
  TensorView lora_a;         // [R, K] any float, or not given
  TensorView lora_b;         // [N, R] any float, given with lora_a
  double scaling = 1;
  double dropout = 0;  // 0 <= p <= 1
  TensorView seed;     // int64 [1], given when dropout > 0
  TensorView y;        // out: [M, N], x's dtype
  TensorView t;        // out: [M, R] float32; may be not given on the CPU
  int threads = 1;
  void* stream = nullptr;  // CUDA: the stream to run on
  TensorView workspace;    // CUDA: uint8 [lora_linear_forward_workspace(params)]
};
void lora_linear_forward(const LoraLinearParams& params);
// Bytes of scratch memory that the call needs on the device: 0 on the CPU, which has its own.
int64_t lora_linear_forward_workspace(const LoraLinearParams& params);

// Gradients that are not given are not computed. `x` is read only for d_lora_a, `t` only for
// d_lora_b.
struct LoraLinearBackwardParams {
  TensorView dy;  // [M, N] float32, bfloat16 or float16
  TensorView x;   // [M, K] dy's dtype
  QuantizedView weight;
  int64_t in_features = 0;  // K
  TensorView lora_a;        // [R, K]
  TensorView lora_b;        // [N, R]
  TensorView t;             // [M, R] from forward
  double scaling = 1;
  double dropout = 0;
  TensorView seed;      // int64 [1]
  TensorView dx;        // out: [M, K] dy's dtype
  TensorView d_lora_a;  // out: [R, K] any float
  TensorView d_lora_b;  // out: [N, R] any float
  TensorView d_bias;    // out: [N] any float
  int threads = 1;
  void* stream = nullptr;
  TensorView workspace;  // CUDA: uint8 [lora_linear_backward_workspace(params)]
};
void lora_linear_backward(const LoraLinearBackwardParams& params);
int64_t lora_linear_backward_workspace(const LoraLinearBackwardParams& params);

// What `dtype` activations would run on (at 512 x 4096 x 4096).
std::vector<VariantStatus> lora_linear_variants(DType dtype);

// The roof: GFLOP/s of the inner product kernel that `dtype` activations run on, operands in cache.
double peak_gflops(DType dtype, int threads);

}  // namespace halfbyte
