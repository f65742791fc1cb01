// Hands checked calls of the LoRA linear to the CUDA library.
#include "lora_linear_cuda.h"

#include "support/cuda_library.h"

namespace halfbyte {
namespace {

cuda::Operand operand(const Matrix& matrix) {
  return {matrix.data, matrix.dtype};
}

const int64_t* seed_of(const TensorView& seed, const DropoutMask& dropout) {
  return dropout.threshold ? seed.as<int64_t>() : nullptr;
}

// T is an output that autograd keeps: on a device there is no scratch of our own for it.
cuda::ForwardLaunch launch_of(const LoraLinearParams& params, const ForwardArgs& args) {
  HALFBYTE_CHECK(!params.lora_a.given || params.t.given, "t: expected float32[M, R], got nothing");
  cuda::ForwardLaunch launch{};
  launch.M = args.x.rows;
  launch.N = params.out_features;
  launch.K = args.x.cols;
  launch.R = args.lora_a.rows;
  launch.x = operand(args.x);
  launch.weight = {args.weight, params.weight.codebook};
  launch.bias = operand(args.bias);
  launch.lora_a = operand(args.lora_a);
  launch.lora_b = operand(args.lora_b);
  launch.scaling = args.scaling;
  launch.seed = seed_of(params.seed, args.dropout);
  launch.dropout_threshold = args.dropout.threshold;
  launch.dropout_scale = args.dropout.scale;
  launch.y = operand(args.y);
  launch.t = params.t.as<float>();
  launch.workspace = params.workspace.data;
  return launch;
}

cuda::BackwardLaunch launch_of(const LoraLinearBackwardParams& params, const BackwardArgs& args) {
  cuda::BackwardLaunch launch{};
  launch.M = args.dy.rows;
  launch.N = args.dy.cols;
  launch.K = args.in_features;
  launch.R = args.lora_a.rows;
  launch.dy = operand(args.dy);
  launch.x = operand(args.x);
  launch.weight = {args.weight, params.weight.codebook};
  launch.lora_a = operand(args.lora_a);
  launch.lora_b = operand(args.lora_b);
  launch.t = params.t.as<float>();
  launch.scaling = args.scaling;
  launch.seed = seed_of(params.seed, args.dropout);
  launch.dropout_threshold = args.dropout.threshold;
  launch.dropout_scale = args.dropout.scale;
  launch.dx = operand(args.dx);
  launch.d_lora_a = operand(args.d_lora_a);
  launch.d_lora_b = operand(args.d_lora_b);
  launch.d_bias = operand(args.d_bias);
  launch.workspace = params.workspace.data;
  return launch;
}

void check_workspace(const TensorView& workspace, const TensorView& x, int64_t bytes) {
  if (bytes == 0) return;
  check_dtype("workspace", workspace, {DType::kUInt8});
  check_places("x", x.place, {{"workspace", workspace}});
  HALFBYTE_CHECK(workspace.numel() >= bytes, "workspace: expected ", bytes, " bytes, got ",
                 describe(workspace));
}

}  // namespace

int64_t lora_linear_forward_workspace_cuda(const LoraLinearParams& params,
                                           const ForwardArgs& args) {
  return cuda_api().lora_linear_forward_workspace(launch_of(params, args),
                                                  cuda_where(params.x, params.stream));
}

int64_t lora_linear_backward_workspace_cuda(const LoraLinearBackwardParams& params,
                                            const BackwardArgs& args) {
  return cuda_api().lora_linear_backward_workspace(launch_of(params, args),
                                                   cuda_where(params.dy, params.stream));
}

void lora_linear_forward_cuda(const LoraLinearParams& params, const ForwardArgs& args) {
  const cuda::Where where = cuda_where(params.x, params.stream);
  const cuda::ForwardLaunch launch = launch_of(params, args);
  check_workspace(params.workspace, params.x,
                  cuda_api().lora_linear_forward_workspace(launch, where));
  if (launch.M > 0) check_cuda("lora_linear", cuda_api().lora_linear_forward(launch, where));
}

void lora_linear_backward_cuda(const LoraLinearBackwardParams& params, const BackwardArgs& args) {
  const cuda::Where where = cuda_where(params.dy, params.stream);
  const cuda::BackwardLaunch launch = launch_of(params, args);
  check_workspace(params.workspace, params.dy,
                  cuda_api().lora_linear_backward_workspace(launch, where));
  check_cuda("lora_linear_backward", cuda_api().lora_linear_backward(launch, where));
}

}  // namespace halfbyte
