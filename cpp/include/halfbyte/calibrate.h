// 4-bit codes and scales that serve a layer's inputs rather than its weight alone.
//
// A linear layer y = W x on inputs with second moments H = E[x x^T] is damaged by q instead of a
// row w of W as much as (w - q) H (w - q)^T. Plain quantization (nf4.h) looks at w - q only. Two
// steps do better in the same format, read by the same kernels:
//
// search_scales, with h = diag(H) alone: for each block of the flattened weight the signed scale
//   s = argmin sum_i h[i mod K] (w[i] - s level[code(w[i] / s)])^2
// A negative scale is legal and useful: the NF4 levels are not symmetric. With u = w / absmax and
// s = absmax g, the candidates are g = 1, which is plain quantization, and both signs of
// kFirstCandidate + n kCandidateStep; the best of each sign is refined by least squares given its
// codes, g = sum h u level / sum h level^2, as long as the sum falls. Where nothing beats g = 1 the
// scale is absmax. Sums: element i of the block goes to lane i mod 16 in float32 without fused
// products, lanes are added in order in float64; so every variant makes the same bits.
//
// feedback_codes, with fixed scales and all of H: columns are coded one after the other, in
// `order`, each against what the errors d = w - q of the others leave for it to make good:
//   t[k] = w[k] + sum_{j != k} d[j] A[k][j],  q[k] = the level times scale nearest to t[k]
//   d[k] = w[k] - q[k]
// With H = V D V^T, V unit upper triangular, d = 0 and A[k][j] = V[j][k] for j < k (`triangular`)
// this is GPTQ's error feedback (Frantar et al. 2022) in the form of LDLQ (Chee et al. 2023): each
// code minimises its own term of d H d^T = sum_k D[k] (d[k] + sum_{j<k} d[j] V[j][k])^2. With
// A[k][j] = H[k][j] / H[k][k] and the d of an earlier pass it is a sweep of coordinate descent: d H
// d^T never rises. Rows are independent, and scales are looked up by flat index, so blocks may
// straddle rows. Order of the float32 sum, products not fused: columns go in panels of 8, the last
// few alone; j outside the panel ascending, then those inside it.
#pragma once

#include <vector>

#include "halfbyte/codebook.h"
#include "halfbyte/tensor_view.h"
#include "halfbyte/variant.h"

namespace halfbyte {

struct SearchScalesParams {
  TensorView weight;   // [N, K]; float32, bfloat16 or float16, finite
  TensorView moments;  // float32 [K]: h, finite and not negative
  CodebookId codebook = CodebookId::kNf4;
  int64_t block_size = 64;  // a power of two, 32 .. 4096
  TensorView scales;        // float32 [ceil(N K / block_size)]
  int threads = 1;
};
void search_scales(const SearchScalesParams& params);

struct FeedbackCodesParams {
  TensorView weight;        // float32 [N, K], finite
  TensorView scales;        // float32 [ceil(N K / block_size)], finite: as they will be decoded
  TensorView coefficients;  // float32 [K, K]: A, in the order of coding; the diagonal is not read
  TensorView order;         // int64 [K]: the column that is coded k-th, a permutation
  bool triangular = true;   // j > k is left out
  CodebookId codebook = CodebookId::kNf4;
  int64_t block_size = 64;
  TensorView errors;  // float32 [N, K], in and out: d
  TensorView codes;   // uint8 [N, K], a code a byte
  int threads = 1;
};
void feedback_codes(const FeedbackCodesParams& params);

std::vector<VariantStatus> search_scales_variants();
std::vector<VariantStatus> feedback_codes_variants();

}  // namespace halfbyte
