// Checks and the variant tables of the LoRA linear.
#include "halfbyte/lora_linear.h"

#include <memory>

#include "lora_linear_cuda.h"
#include "lora_linear_impl.h"
#include "support/cpu_features.h"
#include "support/parallel.h"

namespace halfbyte {
namespace {

constexpr std::initializer_list<DType> kFloats = {DType::kFloat32, DType::kBFloat16,
                                                  DType::kFloat16};

// Below this many multiply-adds bf16 arithmetic gains nothing, and fp32 is more exact.
constexpr int64_t kSmallProduct = 1 << 16;

// Well below 1, so that noise in the measurement does not change the choice from run to run.
constexpr double kWorthwhileSpeedup = 0.75;

DType activation_dtype(const ForwardArgs& args) {
  return args.x.dtype;
}
DType activation_dtype(const BackwardArgs& args) {
  return args.dy.dtype;
}
int64_t multiply_adds(const ForwardArgs& args) {
  return args.x.rows * args.weight.count;
}
int64_t multiply_adds(const BackwardArgs& args) {
  return args.dy.rows * args.weight.count;
}

// Why bf16 arithmetic is not for this product.
template <class Args>
std::string needs_bf16_work(const Args& args) {
  if (activation_dtype(args) != DType::kBFloat16)
    return std::string("bf16 arithmetic is for bfloat16 activations, these are ") +
           dtype_name(activation_dtype(args));
  if (multiply_adds(args) < kSmallProduct)
    return concat("fp32 arithmetic is as fast and more exact below ", kSmallProduct,
                  " multiply-adds, this product has ", multiply_adds(args));
  return "";
}

template <class Args>
std::string needs_amx(const Args& args) {
  if (!cpu_features().amx_bf16 || !cpu_features().avx512_vbmi)
    return "needs AMX-TILE, AMX-BF16 and AVX512-VBMI";
  return needs_bf16_work(args);
}

template <class Args>
std::string needs_avx512bf16(const Args& args) {
  if (!cpu_features().avx512_bf16 || !cpu_features().avx512_vbmi)
    return "needs AVX512-BF16 and AVX512-VBMI";
  const std::string why_not = needs_bf16_work(args);
  if (!why_not.empty()) return why_not;
  if (bf16_speedup() < kWorthwhileSpeedup)
    return concat("bf16 arithmetic was measured at ", bf16_speedup(),
                  " times the speed of fp32 on this processor");
  return "";
}

template <const PanelKernels& (*kernels)()>
void forward(const ForwardArgs& args) {
  forward_with_panels(kernels(), args);
}
template <const PanelKernels& (*kernels)()>
void backward(const BackwardArgs& args) {
  backward_with_panels(kernels(), args);
}

const Variant<ForwardArgs> kForwardTable[] = {
#if defined(__x86_64__)
    {"amx", needs_amx, forward<panel_kernels_amx>},
    {"avx512bf16", needs_avx512bf16, forward<panel_kernels_avx512bf16>},
    {"avx512", needs_avx512, forward<panel_kernels_avx512>},
    {"avx2", needs_avx2, forward<panel_kernels_avx2>},
#endif
    {"portable", always, forward<panel_kernels_portable>},
    {"reference", always, forward_reference},
};

const Variant<BackwardArgs> kBackwardTable[] = {
#if defined(__x86_64__)
    {"amx", needs_amx, backward<panel_kernels_amx>},
    {"avx512bf16", needs_avx512bf16, backward<panel_kernels_avx512bf16>},
    {"avx512", needs_avx512, backward<panel_kernels_avx512>},
    {"avx2", needs_avx2, backward<panel_kernels_avx2>},
#endif
    {"portable", always, backward<panel_kernels_portable>},
    {"reference", always, backward_reference},
};

Matrix matrix_of(const TensorView& view) {
  if (!view.given) return {nullptr, DType::kFloat32, 0, 0, 0};
  const bool vector = view.shape.size() == 1;
  const int64_t rows = vector ? 1 : view.shape[0];
  const int64_t cols = vector ? view.shape[0] : view.shape[1];
  return {view.data, view.dtype, rows, cols, cols};
}

void check_two_dimensional(const char* name, const TensorView& view) {
  check_dtype(name, view, kFloats);
  HALFBYTE_CHECK(view.shape.size() == 2, name, ": expected 2 dimensions, got ", describe(view));
}

int64_t weight_count(int64_t N, int64_t K) {
  const int64_t extents[] = {N, K};
  return element_count("weight", extents, 2);
}

// Rank of the LoRA branch, 0 without one.
int64_t check_lora(const TensorView& a, const TensorView& b, int64_t K, int64_t N) {
  HALFBYTE_CHECK(a.given == b.given, "lora_a and lora_b: expected both or neither, got lora_a ",
                 describe(a), " and lora_b ", describe(b));
  if (!a.given) return 0;
  check_two_dimensional("lora_a", a);
  const int64_t R = a.shape[0];
  HALFBYTE_CHECK(R >= 1 && R <= kMaxRank, "lora_a: expected a rank of 1 to ", kMaxRank, ", got ",
                 describe(a));
  check_tensor("lora_a", a, kFloats, {R, K});
  check_tensor("lora_b", b, kFloats, {N, R});
  return R;
}

DropoutMask checked_dropout(double p, const TensorView& seed) {
  HALFBYTE_CHECK(p >= 0 && p <= 1, "dropout: expected 0 <= p <= 1, got ", p);
  if (p == 0) return {0, 0, 1};
  check_tensor("seed", seed, {DType::kInt64}, {1});
  // A seed on a device is read there.
  const int64_t value = seed.place.is_cuda() ? 0 : *seed.as<int64_t>();
  return make_dropout_mask(p, static_cast<uint64_t>(value));
}

void check_out(const char* name, const TensorView& view, const std::vector<int64_t>& shape) {
  if (view.given) check_tensor(name, view, kFloats, shape);
}

ForwardArgs checked_forward(const LoraLinearParams& params) {
  check_two_dimensional("x", params.x);
  const int64_t M = params.x.shape[0], K = params.x.shape[1], N = params.out_features;
  HALFBYTE_CHECK(N >= 1, "out_features: expected at least 1, got ", N);
  const int64_t R = check_lora(params.lora_a, params.lora_b, K, N);
  check_tensor("y", params.y, {params.x.dtype}, {M, N});
  if (params.bias.given) check_tensor("bias", params.bias, kFloats, {N});
  if (params.t.given) check_tensor("t", params.t, {DType::kFloat32}, {M, R});
  const Place& place = params.x.place;
  check_places("x", place,
               {{"bias", params.bias},
                {"lora_a", params.lora_a},
                {"lora_b", params.lora_b},
                {"seed", params.seed},
                {"y", params.y},
                {"t", params.t}});

  ForwardArgs args{};
  args.x = matrix_of(params.x);
  args.weight = checked_bits(params.weight, weight_count(N, K), "x", place);
  args.bias = matrix_of(params.bias);
  args.lora_a = matrix_of(params.lora_a);
  args.lora_b = matrix_of(params.lora_b);
  args.scaling = static_cast<float>(params.scaling);
  args.dropout = checked_dropout(R ? params.dropout : 0, params.seed);
  args.y = matrix_of(params.y);
  args.t = matrix_of(params.t);
  args.threads = usable_threads(params.threads);
  return args;
}

BackwardArgs checked_backward(const LoraLinearBackwardParams& params) {
  check_two_dimensional("dy", params.dy);
  const int64_t M = params.dy.shape[0], N = params.dy.shape[1], K = params.in_features;
  HALFBYTE_CHECK(K >= 1, "in_features: expected at least 1, got ", K);
  const int64_t R = check_lora(params.lora_a, params.lora_b, K, N);
  if (params.dx.given) check_tensor("dx", params.dx, {params.dy.dtype}, {M, K});
  check_out("d_lora_a", params.d_lora_a, {R, K});
  check_out("d_lora_b", params.d_lora_b, {N, R});
  check_out("d_bias", params.d_bias, {N});
  if (params.d_lora_a.given) check_tensor("x", params.x, {params.dy.dtype}, {M, K});
  if (params.d_lora_b.given) check_tensor("t", params.t, {DType::kFloat32}, {M, R});
  const Place& place = params.dy.place;
  check_places("dy", place,
               {{"x", params.x},
                {"lora_a", params.lora_a},
                {"lora_b", params.lora_b},
                {"t", params.t},
                {"seed", params.seed},
                {"dx", params.dx},
                {"d_lora_a", params.d_lora_a},
                {"d_lora_b", params.d_lora_b},
                {"d_bias", params.d_bias}});

  BackwardArgs args{};
  args.dy = matrix_of(params.dy);
  args.x = matrix_of(params.x);
  args.weight = checked_bits(params.weight, weight_count(N, K), "dy", place);
  args.lora_a = matrix_of(params.lora_a);
  args.lora_b = matrix_of(params.lora_b);
  args.t = matrix_of(params.t);
  args.scaling = static_cast<float>(params.scaling);
  args.dropout = checked_dropout(R ? params.dropout : 0, params.seed);
  args.in_features = K;
  args.dx = matrix_of(params.dx);
  args.d_lora_a = matrix_of(params.d_lora_a);
  args.d_lora_b = matrix_of(params.d_lora_b);
  args.d_bias = matrix_of(params.d_bias);
  args.threads = usable_threads(params.threads);
  return args;
}

}  // namespace

#if defined(__x86_64__)
const PanelKernels& panel_kernels_amx() {
  static const PanelKernels kernels = [] {
    PanelKernels tiled = panel_kernels_avx512bf16();
    tiled.multiply = multiply_amx;
    tiled.most_few_rows = 3;
    return tiled;
  }();
  return kernels;
}
#endif

void lora_linear_forward(const LoraLinearParams& params) {
  ForwardArgs args = checked_forward(params);
  if (params.x.place.is_cuda()) return lora_linear_forward_cuda(params, args);

  std::unique_ptr<AlignedBuffer> own_t;
  const int64_t M = args.x.rows, R = args.lora_a.rows;
  if (R && !params.t.given) {
    own_t = std::make_unique<AlignedBuffer>(static_cast<size_t>(M * R) * sizeof(float));
    args.t = {own_t->as<void>(), DType::kFloat32, M, R, R};
  }
  const Variant<ForwardArgs>& variant = select_variant("lora_linear", kForwardTable, args);
  if (M > 0) variant.run(args);
}

void lora_linear_backward(const LoraLinearBackwardParams& params) {
  const BackwardArgs args = checked_backward(params);
  if (params.dy.place.is_cuda()) return lora_linear_backward_cuda(params, args);
  select_variant("lora_linear", kBackwardTable, args).run(args);
}

int64_t lora_linear_forward_workspace(const LoraLinearParams& params) {
  const ForwardArgs args = checked_forward(params);
  return params.x.place.is_cuda() ? lora_linear_forward_workspace_cuda(params, args) : 0;
}

int64_t lora_linear_backward_workspace(const LoraLinearBackwardParams& params) {
  const BackwardArgs args = checked_backward(params);
  return params.dy.place.is_cuda() ? lora_linear_backward_workspace_cuda(params, args) : 0;
}

std::vector<VariantStatus> lora_linear_variants(DType dtype) {
  ForwardArgs args{};
  args.x = {nullptr, dtype, 512, 4096, 4096};
  args.weight.count = int64_t{4096} * 4096;
  return list_variants("lora_linear", kForwardTable, args);
}

}  // namespace halfbyte
