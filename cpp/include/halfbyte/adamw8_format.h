// 8-bit AdamW: how a tensor keeps its moments, and the exact arithmetic of one step. Plain C,
// shared by kernels and CUDA.
//
// State of a tensor, over its flattened elements in blocks of 256 (a short last block has its own
// scale); U and S are the unsigned and the signed 8-bit dynamic map (dynamic8_format.h):
//
//   kRatio     s = U[v_code] * v_absmax          v = s * s        m = (S[m_code] * m_absmax) * s
//   kMoments   v = U[v_code] * v_absmax          m = S[m_code] * m_absmax
//   kFloat32   m, v as stored
//
// kRatio keeps sqrt(v) and m / sqrt(v): the ratio is bounded, so one large coordinate does not
// drown the rest of its block, and the root halves v's range of exponents. 2 + 2 * 4 / 256 = 2.031
// bytes a parameter for both 8-bit states.
//
// THE CONTRACT. Every backend produces these bits. All arithmetic is fp32, each operation rounded
// to nearest even on its own (no fused multiply-add), subnormals kept. Scalars are computed in fp64
// and rounded once: b1, b2, c1 = 1 - b1 (its negative when maximizing), c2 = 1 - b2, eps, decay = 1
// - lr * weight_decay, size = lr / (1 - b1^t), root = 1 / sqrt(1 - b2^t); t counts from 1, and b^t
// is a product of repeated squares, which has the same bits everywhere (`adamw8_scalars`).
//
//   m = b1 * m + c1 * g
//   v = b2 * v + (c2 * g) * g
//   s = sqrt(v)
//   d = s * root + eps
//   q = d == 0 ? 0 : m / d
//   p = p * decay - size * q                      then rounded to the parameter's dtype
//
// and the fresh moments are encoded:
//
//   m = 0 where v overflowed to infinity (the step above was m / inf = 0; the entry starts afresh)
//   scale and inverse of a block: A = max |value|; a non-zero A is clamped to [2^-126, cap];
//       absmax = A, inverse = A == 0 ? 0 : 1 / A
//   x = value * inverse
//   m_code = #{i : x > signed threshold i}        the nearest value, a tie goes down
//   v_code = value == 0 ? 0 : max(1, #{i : x > unsigned threshold i})     never flushed to zero
//   kMoments   encode m and v, both with cap FLT_MAX
//   kRatio     encode s with cap sqrt(FLT_MAX) rounded down, and r = s == 0 ? 0 : m / s with cap
//              FLT_MAX
//
// r is taken against the fresh s, not the decoded one: decoding then gives back m / s, the
// direction of the step, without the error of s's own code (over 200 steps at gradient scales of
// log-normal sigma 3 it brings the distance to fp32 AdamW from .26 of its path to .21).
//
// A zero gradient on zero state leaves the parameter as it is (times decay).
#pragma once

#include <math.h>
#include <stdint.h>

#include "halfbyte/dtype.h"
#include "halfbyte/dynamic8_format.h"

namespace halfbyte {

enum class AdamW8State { kFloat32, kMoments, kRatio };

constexpr int64_t kAdamW8Block = kDynamic8Block;

constexpr float kSmallestScale = 1.17549435e-38f;  // 2^-126: its reciprocal is finite
constexpr float kLargestFloat = 3.40282347e+38f;
constexpr float kLargestRoot = 1.84467429741979238e+19f;  // the largest fp32 with a finite square

// The scalars of the contract.
struct AdamW8Scalars {
  float b1, c1, b2, c2, eps, decay, size, root;
};

// base^exponent for a whole exponent >= 0.
HALFBYTE_HOST_DEVICE static inline double adamw8_power(double base, int64_t exponent) {
  double power = 1;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) power *= base;
    base *= base;
  }
  return power;
}

// The scalars of step t >= 1. Compile without contraction of fp64 multiply-adds.
HALFBYTE_HOST_DEVICE static inline AdamW8Scalars adamw8_scalars(double lr, double beta1,
                                                                double beta2, double eps,
                                                                double weight_decay, bool maximize,
                                                                int64_t t) {
  AdamW8Scalars k;
  k.b1 = static_cast<float>(beta1);
  k.c1 = static_cast<float>(maximize ? beta1 - 1 : 1 - beta1);
  k.b2 = static_cast<float>(beta2);
  k.c2 = static_cast<float>(1 - beta2);
  k.eps = static_cast<float>(eps);
  k.decay = static_cast<float>(1 - lr * weight_decay);
  k.size = static_cast<float>(lr / (1 - adamw8_power(beta1, t)));
  k.root = static_cast<float>(1 / sqrt(1 - adamw8_power(beta2, t)));
  return k;
}

// One parameter tensor, contiguous. n = count, blocks = ceil(n / 256).
struct AdamW8Tensor {
  int64_t count = 0;
  void* param = nullptr;       // param_dtype [n]
  const void* grad = nullptr;  // grad_dtype [n]
  DType param_dtype = DType::kFloat32;
  DType grad_dtype = DType::kFloat32;
  AdamW8State state = AdamW8State::kRatio;
  void* exp_avg = nullptr;             // uint8 [n] codes, or float32 [n] for kFloat32
  void* exp_avg_sq = nullptr;          // the same
  float* exp_avg_absmax = nullptr;     // float32 [blocks]; null for kFloat32
  float* exp_avg_sq_absmax = nullptr;  // float32 [blocks]; null for kFloat32
  float* step = nullptr;               // float32 [1]: steps done, incremented by the call
  int64_t group = 0;                   // which hyperparameters: row of AdamW8Params::groups
};

}  // namespace halfbyte
