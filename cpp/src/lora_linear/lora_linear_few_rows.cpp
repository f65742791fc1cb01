// How a product with few rows is cut into tasks: 64 output features each, straight from the packed
// bytes. The LoRA branch is small here and runs in fp32 dot products.
#include <algorithm>

#include "lora_linear_impl.h"
#include "support/parallel.h"
#include "support/scalar.h"

namespace halfbyte {
namespace {

constexpr int64_t kTaskFeatures = 64;

void compute_t(const PanelKernels& kernels, const ForwardArgs& args) {
  const int64_t ranks = args.lora_a.rows;
  parallel_for(ranks, args.lora_a.rows * args.lora_a.cols < 32768 ? 1 : args.threads,
               [&](int64_t r) {
                 for (int64_t m = 0; m < args.x.rows; ++m)
                   store_element(args.t.data, args.t.dtype, m * args.t.stride + r,
                                 kernels.dot_rows(args.x, m, args.lora_a, r, args.dropout));
               });
}

}  // namespace

bool few_rows_fit(const ForwardArgs& args) {
  return args.x.rows <= kFewRows && args.x.cols % 64 == 0 && args.weight.block_shift >= 6;
}

void forward_with_few_rows(const PanelKernels& kernels, const ForwardArgs& args) {
  const int64_t M = args.x.rows, K = args.x.cols, N = args.y.cols;
  const int64_t padded = (K + kFewRowsChunk - 1) / kFewRowsChunk * kFewRowsChunk;
  AlignedBuffer x(static_cast<size_t>(M * padded) * sizeof(float));
  kernels.permute_activations(args.x, x.as<void>());
  if (args.lora_a.data) compute_t(kernels, args);

  parallel_for((N + kTaskFeatures - 1) / kTaskFeatures, args.threads, [&](int64_t task) {
    float out[kFewRows * kTaskFeatures];
    FewRows few{};
    few.weight = &args.weight;
    few.K = K;
    few.x = x.as<void>();
    few.rows = M;
    few.first = task * kTaskFeatures;
    few.last = std::min(N, few.first + kTaskFeatures);
    few.scales_stride = padded / 64;
    few.scales = static_cast<float*>(thread_scratch(
        ScratchSlot::kRows, static_cast<size_t>(4 * few.scales_stride) * sizeof(float)));
    few.out = out;
    few.out_stride = kTaskFeatures;
    kernels.few_rows(few);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = few.first; n < few.last; ++n) {
        float value = out[m * kTaskFeatures + n - few.first];
        if (args.bias.data) value += load_element(args.bias.data, args.bias.dtype, n);
        if (args.lora_a.data)
          value += args.scaling * kernels.dot_rows(args.t, m, args.lora_b, n, {0, 0, 1});
        store_element(args.y.data, args.y.dtype, m * args.y.stride + n, value);
      }
  });
}

}  // namespace halfbyte
