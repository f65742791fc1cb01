// The reference of the LoRA linear: the formulas of lora_linear.h as plain loops, sums in double,
// one thread. It never gets faster; every other variant is held to it.
#include <stdlib.h>

#include "lora_linear_impl.h"
#include "support/scalar.h"

namespace halfbyte {
namespace {

double at(const Matrix& m, int64_t row, int64_t col) {
  return load_element(m.data, m.dtype, row * m.stride + col);
}

void put(const Matrix& m, int64_t row, int64_t col, double value) {
  store_element(m.data, m.dtype, row * m.stride + col, static_cast<float>(value));
}

double weight_at(const Nf4Bits& bits, int64_t index, DType activation) {
  const float scale = nf4_block_scale(bits, index >> bits.block_shift);
  const DType precision = activation == DType::kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
  return round_to(precision, bits.levels[nf4_code(bits, index)] * scale);
}

// drop(value) at (row, col); a dropped value is 0 whatever it was.
double dropped(const DropoutMask& mask, int64_t row, int64_t col, double value) {
  if (mask.threshold == 0) return value;
  const float factor = dropout_factor(mask, dropout_row_key(mask, row), col);
  return factor == 0 ? 0 : factor * value;
}

}  // namespace

void forward_reference(const ForwardArgs& args) {
  const int64_t M = args.x.rows, K = args.x.cols, N = args.y.cols;
  const int64_t R = args.lora_a.data ? args.lora_a.rows : 0;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t r = 0; r < R; ++r) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k)
        sum += dropped(args.dropout, m, k, at(args.x, m, k)) * at(args.lora_a, r, k);
      put(args.t, m, r, sum);
    }
    for (int64_t n = 0; n < N; ++n) {
      double sum = args.bias.data ? at(args.bias, 0, n) : 0;
      for (int64_t k = 0; k < K; ++k)
        sum += at(args.x, m, k) * weight_at(args.weight, n * K + k, args.x.dtype);
      for (int64_t r = 0; r < R; ++r)
        sum += args.scaling * at(args.t, m, r) * at(args.lora_b, n, r);
      put(args.y, m, n, sum);
    }
  }
}

void backward_reference(const BackwardArgs& args) {
  const int64_t M = args.dy.rows, N = args.dy.cols, K = args.in_features;
  const int64_t R = args.lora_a.data ? args.lora_a.rows : 0;
  double* u = static_cast<double*>(malloc(sizeof(double) * static_cast<size_t>(M * R + 1)));
  for (int64_t m = 0; m < M; ++m)
    for (int64_t r = 0; r < R; ++r) {
      double sum = 0;
      for (int64_t n = 0; n < N; ++n) sum += at(args.dy, m, n) * at(args.lora_b, n, r);
      u[m * R + r] = args.scaling * sum;
    }
  if (args.dx.data)
    for (int64_t m = 0; m < M; ++m)
      for (int64_t k = 0; k < K; ++k) {
        double lora = 0;
        for (int64_t r = 0; r < R; ++r) lora += u[m * R + r] * at(args.lora_a, r, k);
        double sum = R ? dropped(args.dropout, m, k, lora) : 0;
        for (int64_t n = 0; n < N; ++n)
          sum += at(args.dy, m, n) * weight_at(args.weight, n * K + k, args.dy.dtype);
        put(args.dx, m, k, sum);
      }
  if (args.d_lora_a.data)
    for (int64_t r = 0; r < R; ++r)
      for (int64_t k = 0; k < K; ++k) {
        double sum = 0;
        for (int64_t m = 0; m < M; ++m)
          sum += u[m * R + r] * dropped(args.dropout, m, k, at(args.x, m, k));
        put(args.d_lora_a, r, k, sum);
      }
  if (args.d_lora_b.data)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t r = 0; r < R; ++r) {
        double sum = 0;
        for (int64_t m = 0; m < M; ++m) sum += at(args.dy, m, n) * at(args.t, m, r);
        put(args.d_lora_b, n, r, args.scaling * sum);
      }
  if (args.d_bias.data)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t m = 0; m < M; ++m) sum += at(args.dy, m, n);
      put(args.d_bias, 0, n, sum);
    }
  free(u);
}

}  // namespace halfbyte
