// Blockwise 8-bit AdamW: one call updates every tensor of an optimizer step, on all threads,
// without temporaries. The state's formats and the exact arithmetic are in adamw8_format.h.
#pragma once

#include <vector>

#include "halfbyte/adamw8_format.h"
#include "halfbyte/tensor_view.h"
#include "halfbyte/variant.h"

namespace halfbyte {

struct AdamW8Group {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 1e-2;
  bool maximize = false;
};

struct AdamW8Params {
  std::vector<AdamW8Tensor> tensors;
  std::vector<AdamW8Group> groups;
  int threads = 1;
  Place place;             // where all tensors, their steps included, lie
  void* stream = nullptr;  // CUDA: the stream to run on
  // CUDA: int64 [1], pinned host or device memory that outlives the launch. It receives -1, or
  // (tensor << 40 | index) of the first non-finite gradient element, without anyone waiting.
  TensorView bad;
};

// The first non-finite gradient element (lowest tensor, then lowest index), or tensor = -1.
struct AdamW8Result {
  int64_t tensor = -1;
  int64_t index = -1;
  bool done() const { return tensor < 0; }
};

// Throws unless every group and tensor of `params` can be stepped.
void check_adamw8(const AdamW8Params& params);

// One step. All gradients are looked at before anything is written: when one is not finite, nothing
// changes and the result says where; on CUDA, `bad` does, once the stream has come there.
AdamW8Result adamw8_step(const AdamW8Params& params);

std::vector<VariantStatus> adamw8_variants();

}  // namespace halfbyte
