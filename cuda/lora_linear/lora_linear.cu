// The LoRA linear on CUDA: what is launched in which order, where scratch lies, and the variant
// table of the product with the packed weight.
//
//   forward    T = drop(x) A^T;   y = x W^T + bias + s T B^T
//   backward   U = s dY B;   dX = dY W + drop'(U A);   dA = U^T drop(x);   dB = s dY^T T;   dbias
//
// The launches of a call follow each other on its stream, so that one piece of the workspace serves
// all their partial sums; U has a piece of its own. Nothing is allocated and nothing waits: a call
// can be captured in a CUDA graph.
#include "lora_linear/lora_linear.h"

#include "device/error.h"
#include "device/variant.h"
#include "lora_linear/lora_linear_impl.h"

namespace halfbyte::cuda {
namespace {

constexpr char kOp[] = "lora_linear";

// From this many rows on the Python layer dequantizes W panel by panel (small enough to stay in L2)
// and multiplies with torch's matmul. Not measured on a card; from public figures: dequantizing all
// of W to memory first adds to the matmul, at M = 512 / 2048 / 4096, 92 / 23 / 12 % on an H100,
// 55 / 14 / 7 % on an A100 and 71 / 18 / 9 % on a 4090, and panels that stay in L2 avoid most of
// it; the fused kernel decodes W once every 128 rows and, on mma.sync, stays below what wgmma gives
// the matmul of an H100. The two meet between 1024 and 2048 rows.
constexpr int64_t kPanelRows = 2048;

constexpr int64_t kFewRows = 16;

// --- the variant table ---------------------------------------------------------------------------

using Splits = int (*)(const Product&);
using Launcher = void (*)(const Product&, cudaStream_t);

template <Splits splits, Launcher launcher>
const char* run(const Product& product, Where where) {
  Product split = product;
  split.splits = splits(product);
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  launcher(split, stream);
  if (split.splits > 1) launch_sum_partials(split, stream);
  return launched(kOp);
}

bool is_16_bit(const Product& p) {
  return p.left.dtype == DType::kBFloat16 || p.left.dtype == DType::kFloat16;
}

const char* by_the_python_layer(const Product& p) {
  if (p.M < kPanelRows)
    return say("for %lld rows and more, these are %lld", static_cast<long long>(kPanelRows),
               static_cast<long long>(p.M));
  return "panels are dequantized here and multiplied by torch: the Python layer's choice";
}

const char* no_launch(const Product& product, Where) {
  return by_the_python_layer(product);
}

// What the kernels that read 16 packed bytes at a time ask for.
const char* needs_whole_chunks(const Product& p) {
  const int64_t row_length = p.transposed ? p.J : p.D;
  if (!is_16_bit(p)) return "for bfloat16 and float16 activations, these are float32";
  if (row_length % 64 != 0)
    return say("needs rows of whole 64-element blocks, these have %lld",
               static_cast<long long>(row_length));
  if (p.weight.bits.block_shift < 6) return "needs blocks of at least 64 elements";
  if (p.D % 8 != 0)
    return say("needs activation rows of whole 16-byte chunks, these have %lld elements",
               static_cast<long long>(p.D));
  if (!is_aligned(p.weight.bits.packed, 16) || !is_aligned(p.left.data, 16))
    return "needs codes and activations that start at multiples of 16 bytes";
  return kOk;
}

const char* needs_few_rows(const Product& p) {
  if (p.transposed) return "for the forward product";
  if (p.M > kFewRows)
    return say("for 1 to %lld rows, these are %lld", static_cast<long long>(kFewRows),
               static_cast<long long>(p.M));
  return kOk;
}

const char* few_rows_fit(const Product& p) {
  const char* reason = needs_few_rows(p);
  return *reason ? reason : needs_whole_chunks(p);
}

const char* needs_16_bit(const Product& p) {
  return is_16_bit(p) ? kOk : "for bfloat16 and float16 activations, these are float32";
}

const Variant<Product> kTable[] = {
    {"cuda_panels", by_the_python_layer, no_launch},
    {"cuda_few_rows", few_rows_fit, run<few_rows_splits, launch_few_rows>},
    {"cuda_few_rows_fma", needs_few_rows, run<few_rows_fma_splits, launch_few_rows_fma>},
    {"cuda_mma", needs_whole_chunks, run<sm80_splits, launch_sm80>},
    {"cuda_mma_any_shape", needs_16_bit, run<any_shape_splits, launch_any_shape>},
    {"cuda_fma", always, run<fp32_splits, launch_fp32>},
};

// --- workspace -----------------------------------------------------------------------------------

int64_t aligned(int64_t bytes) {
  return ceil_div(bytes, 256) * 256;
}

int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

int64_t partial_bytes(int splits, int64_t rows, int64_t columns) {
  return splits > 1 ? splits * rows * columns * static_cast<int64_t>(sizeof(float)) : 0;
}

// Whichever variant is chosen, or forced.
int64_t product_bytes(const Product& p) {
  int most = 1;
  for (const Splits splits :
       {few_rows_splits, few_rows_fma_splits, sm80_splits, any_shape_splits, fp32_splits}) {
    const int count = splits(p);
    most = count > most ? count : most;
  }
  return partial_bytes(most, p.M, p.J);
}

int64_t skinny_bytes(const SkinnyProduct& p) {
  return partial_bytes(p.splits, p.I, p.J);
}

// --- the products of a call ----------------------------------------------------------------------

template <class Launch>
Dropout dropout_of(const Launch& launch) {
  if (!launch.seed) return {nullptr, 0, 1.0f};
  return {launch.seed, launch.dropout_threshold, launch.dropout_scale};
}

float kept_scale(const Dropout& dropout) {
  return dropout.threshold ? dropout.scale : 1.0f;
}

constexpr Dropout kNoDropout = {nullptr, 0, 1.0f};

SkinnyProduct skinny(int64_t I, int64_t J, int64_t D, const SkinnyOperand& left,
                     const SkinnyOperand& right, float alpha, const Operand& out, int64_t out_i,
                     int64_t out_j) {
  SkinnyProduct product = {I, J, D, left, right, alpha, out, out_i, out_j, nullptr, 1};
  product.splits = skinny_splits(product);
  return product;
}

SkinnyProduct t_product(const ForwardLaunch& l) {
  const Dropout dropout = dropout_of(l);
  return skinny(l.M, l.R, l.K, {l.x, l.M, l.K, false, dropout},
                {l.lora_a, l.R, l.K, false, kNoDropout}, kept_scale(dropout),
                {l.t, DType::kFloat32}, l.R, 1);
}

SkinnyProduct u_product(const BackwardLaunch& l, float* u) {
  return skinny(l.M, l.R, l.N, {l.dy, l.M, l.N, false, kNoDropout},
                {l.lora_b, l.N, l.R, true, kNoDropout}, l.scaling, {u, DType::kFloat32}, l.R, 1);
}

SkinnyProduct d_lora_a_product(const BackwardLaunch& l, float* u) {
  const Dropout dropout = dropout_of(l);
  return skinny(l.K, l.R, l.M, {l.x, l.M, l.K, true, dropout},
                {{u, DType::kFloat32}, l.M, l.R, true, kNoDropout}, kept_scale(dropout), l.d_lora_a,
                1, l.K);
}

SkinnyProduct d_lora_b_product(const BackwardLaunch& l) {
  const Operand t = {const_cast<float*>(l.t), DType::kFloat32};
  return skinny(l.N, l.R, l.M, {l.dy, l.M, l.N, true, kNoDropout}, {t, l.M, l.R, true, kNoDropout},
                l.scaling, l.d_lora_b, l.R, 1);
}

Product y_product(const ForwardLaunch& l) {
  return {l.M,      l.N,       l.K,        l.R,    l.x, l.weight, false, l.t,
          l.lora_b, l.scaling, kNoDropout, l.bias, l.y, nullptr,  1};
}

Product dx_product(const BackwardLaunch& l, const float* u) {
  return {l.M,      l.K,  l.N,           l.R, l.dy, l.weight, true, u,
          l.lora_a, 1.0f, dropout_of(l), {},  l.dx, nullptr,  1};
}

bool needs_u(const BackwardLaunch& l) {
  return l.R > 0 && (l.dx.data || l.d_lora_a.data);
}

void launch_with(SkinnyProduct product, float* partials, cudaStream_t stream) {
  product.partials = partials;
  launch_skinny(product, stream);
}

}  // namespace

int64_t lora_linear_forward_workspace(const ForwardLaunch& l, Where) {
  const int64_t t = l.R > 0 ? skinny_bytes(t_product(l)) : 0;
  return aligned(larger(t, product_bytes(y_product(l))));
}

const char* lora_linear_forward(const ForwardLaunch& l, Where where) {
  if (l.M == 0) return kOk;
  float* partials = static_cast<float*>(l.workspace);
  if (l.R > 0) launch_with(t_product(l), partials, static_cast<cudaStream_t>(where.stream));
  Product y = y_product(l);
  y.partials = partials;
  return run_selected(kOp, kTable, y, where);
}

int64_t lora_linear_backward_workspace(const BackwardLaunch& l, Where) {
  int64_t partials = 0;
  if (needs_u(l)) partials = skinny_bytes(u_product(l, nullptr));
  if (l.dx.data) partials = larger(partials, product_bytes(dx_product(l, nullptr)));
  if (l.d_lora_a.data) partials = larger(partials, skinny_bytes(d_lora_a_product(l, nullptr)));
  if (l.d_lora_b.data) partials = larger(partials, skinny_bytes(d_lora_b_product(l)));
  if (l.d_bias.data)
    partials =
        larger(partials, column_sum_splits(l.M, l.N) * l.N * static_cast<int64_t>(sizeof(float)));
  const int64_t u = needs_u(l) ? l.M * l.R * static_cast<int64_t>(sizeof(float)) : 0;
  return aligned(u) + aligned(partials);
}

const char* lora_linear_backward(const BackwardLaunch& l, Where where) {
  const cudaStream_t stream = static_cast<cudaStream_t>(where.stream);
  float* u = static_cast<float*>(l.workspace);
  float* partials = u + (needs_u(l) ? aligned(l.M * l.R * sizeof(float)) / sizeof(float) : 0);
  if (needs_u(l)) launch_with(u_product(l, u), partials, stream);
  if (l.dx.data && l.M > 0) {
    Product dx = dx_product(l, u);
    dx.partials = partials;
    const char* problem = run_selected(kOp, kTable, dx, where);
    if (*problem) return problem;
  }
  if (l.d_lora_a.data) launch_with(d_lora_a_product(l, u), partials, stream);
  if (l.d_lora_b.data) launch_with(d_lora_b_product(l), partials, stream);
  if (l.d_bias.data) launch_column_sum(l.dy, l.M, l.N, l.d_bias, partials, stream);
  return launched(kOp);
}

bool lora_linear_variant(int row, int, VariantRow* out) {
  Product typical = {};
  typical.M = 512, typical.J = typical.D = 4096;
  typical.left.dtype = DType::kBFloat16;
  typical.weight.bits.block_shift = 6;
  return list_row(kOp, kTable, typical, row, out);
}

}  // namespace halfbyte::cuda
