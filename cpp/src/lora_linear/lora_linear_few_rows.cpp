// How a product with few rows is cut into tasks: runs of output features, 64 at a time, straight
// from the packed bytes. The LoRA branch is small here and runs in fp32 dot products.
#include <algorithm>

#include "lora_linear_impl.h"
#include "support/parallel.h"
#include "support/scalar.h"

namespace halfbyte {
namespace {

constexpr int64_t kSliceFeatures = 64;
constexpr int64_t kTasksPerThread = 8, kMaxSlices = 16;

void compute_t(const PanelKernels& kernels, const ForwardArgs& args) {
  const int64_t ranks = args.lora_a.rows;
  parallel_for(ranks, args.lora_a.rows * args.lora_a.cols < 32768 ? 1 : args.threads,
               [&](int64_t r) {
                 for (int64_t m = 0; m < args.x.rows; ++m)
                   store_element(args.t.data, args.t.dtype, m * args.t.stride + r,
                                 kernels.dot_rows(args.x, m, args.lora_a, r, args.dropout));
               });
}

// y of the features [first, first + kSliceFeatures).
void compute_slice(const PanelKernels& kernels, const ForwardArgs& args, const void* x,
                   int64_t padded, int64_t first) {
  const int64_t M = args.x.rows;
  float out[kFewRows * kSliceFeatures];
  FewRows few{};
  few.weight = &args.weight;
  few.K = args.x.cols;
  few.x = x;
  few.rows = M;
  few.first = first;
  few.last = std::min(args.y.cols, first + kSliceFeatures);
  few.scales_stride = padded / 64;
  few.scales = static_cast<float*>(thread_scratch(
      ScratchSlot::kRows, static_cast<size_t>(4 * few.scales_stride) * sizeof(float)));
  few.out = out;
  few.out_stride = kSliceFeatures;
  kernels.few_rows(few);
  if (args.lora_a.data)
    kernels.add_low_rank(args.t, args.lora_b, args.scaling, few.first, few.last, out,
                         kSliceFeatures);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = few.first; n < few.last; ++n) {
      float value = out[m * kSliceFeatures + n - few.first];
      if (args.bias.data) value += load_element(args.bias.data, args.bias.dtype, n);
      store_element(args.y.data, args.y.dtype, m * args.y.stride + n, value);
    }
}

}  // namespace

bool few_rows_fit(const PanelKernels& kernels, const ForwardArgs& args) {
  return args.x.rows <= kernels.most_few_rows && args.x.cols % 64 == 0 &&
         args.weight.block_shift >= 6;
}

void forward_with_few_rows(const PanelKernels& kernels, const ForwardArgs& args) {
  const int64_t M = args.x.rows, K = args.x.cols, N = args.y.cols;
  const int64_t padded = ceil_div(K, kFewRowsChunk) * kFewRowsChunk;
  AlignedBuffer x(static_cast<size_t>(M * padded) * sizeof(float));
  kernels.permute_activations(args.x, x.as<void>());
  if (args.lora_a.data) compute_t(kernels, args);

  // Long runs of rows, so that few of them start where nothing was fetched ahead.
  const int64_t slices = ceil_div(N, kSliceFeatures);
  const int64_t per_task =
      std::clamp<int64_t>(slices / (args.threads * kTasksPerThread), 1, kMaxSlices);
  parallel_for(ceil_div(slices, per_task), args.threads, [&](int64_t task) {
    const int64_t last = std::min(slices, (task + 1) * per_task);
    for (int64_t slice = task * per_task; slice < last; ++slice)
      compute_slice(kernels, args, x.as<void>(), padded, slice * kSliceFeatures);
  });
}

}  // namespace halfbyte
