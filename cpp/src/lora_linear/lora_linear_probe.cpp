// Does bf16 arithmetic pay on this processor? cpuid says that vdpbf16ps exists, not that it is
// fast: one panel that fits L2 is multiplied both ways at first use, about 0.1 ms, minimum of
// several.
#include <algorithm>
#include <chrono>

#include "halfbyte/lora_linear.h"
#include "lora_linear_impl.h"
#include "support/cpu_features.h"
#include "support/parallel.h"

namespace halfbyte {
namespace {

constexpr int64_t kRows = 48, kUnits = 256;

// One product from cache, and how many multiply-adds it is.
struct Probe {
  const PanelKernels& kernels;
  AlignedBuffer panel{static_cast<size_t>(kUnits) * kPanelLanes * 4};
  AlignedBuffer in{static_cast<size_t>(kRows * kUnits) * 4};
  AlignedBuffer out{static_cast<size_t>(kRows) * kPanelLanes * 4};
  PanelProduct product{};

  explicit Probe(const PanelKernels& variant) : kernels(variant) {
    for (int64_t i = 0; i < kUnits * kPanelLanes; ++i) panel.as<uint32_t>()[i] = 0x3C003C00;
    for (int64_t i = 0; i < kRows * kUnits; ++i) in.as<uint32_t>()[i] = 0x3C003C00;
    product.rows = kRows;
    product.lanes = kPanelLanes;
    product.in = in.as<void>();
    product.stride = kUnits * 4;
    product.panel = panel.as<void>();
    product.units = kUnits;
    product.out = out.as<void>();
    product.out_dtype = DType::kFloat32;
    product.out_stride = kPanelLanes;
  }
  double multiply_adds() const {
    return static_cast<double>(kRows * kPanelLanes * kUnits) *
           (kernels.compute == DType::kBFloat16 ? 2 : 1);
  }
};

// Multiply-adds a second on `threads` threads, the best of `repeats` rounds.
double rate(const PanelKernels& kernels, int threads, int repeats, int products) {
  double best = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    parallel_for(threads, threads, [&](int64_t) {
      const Probe probe(kernels);
      for (int i = 0; i < products; ++i) kernels.multiply(probe.product);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    const double work = Probe(kernels).multiply_adds() * threads * products;
    best = std::max(best, work / elapsed.count());
  }
  return best;
}

}  // namespace

double bf16_speedup() {
  static const double speedup =
      rate(panel_kernels_avx512bf16(), 1, 4, 8) / rate(panel_kernels_avx512(), 1, 4, 8);
  return speedup;
}

double peak_gflops(DType dtype, int threads) {
  const PanelKernels* kernels = &panel_kernels_portable();
#if defined(__x86_64__)
  if (cpu_features().avx2_fma_f16c) kernels = &panel_kernels_avx2();
  if (cpu_features().avx512) kernels = &panel_kernels_avx512();
  if (dtype == DType::kBFloat16 && cpu_features().avx512_bf16 && cpu_features().avx512_vbmi)
    kernels = &panel_kernels_avx512bf16();
#else
  (void)dtype;
#endif
  return 2e-9 * rate(*kernels, threads, 5, 400);
}

}  // namespace halfbyte
