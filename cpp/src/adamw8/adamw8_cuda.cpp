// Hands a checked AdamW step to the CUDA library.
#include "adamw8_cuda.h"

#include "support/cuda_library.h"

namespace halfbyte {

void adamw8_step_cuda(const AdamW8Params& params) {
  check_tensor("bad", params.bad, {DType::kInt64}, {1});
  std::vector<cuda::AdamW8GroupLaunch> groups;
  for (const AdamW8Group& g : params.groups)
    groups.push_back({g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, g.maximize});
  cuda::AdamW8Launch launch{};
  launch.tensors = params.tensors.data();
  launch.tensor_count = static_cast<int64_t>(params.tensors.size());
  launch.groups = groups.data();
  launch.group_count = static_cast<int64_t>(groups.size());
  launch.bad = params.bad.as<int64_t>();
  check_cuda("adamw8", cuda_api().adamw8_step(launch, {params.place.index, params.stream}));
}

}  // namespace halfbyte
