// Does bf16 arithmetic pay on this processor? cpuid says that vdpbf16ps exists, not that it is
// fast: one panel that fits L2 is multiplied both ways at first use, about 0.1 ms, minimum of
// several. The roof of the benchmarks is the same product with the longest panel there is.
#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

#include "halfbyte/lora_linear.h"
#include "lora_linear_impl.h"
#include "support/cpu_features.h"
#include "support/parallel.h"

namespace halfbyte {
namespace {

constexpr int64_t kRows = 48, kProbeUnits = 256;

// One product from cache, and how many multiply-adds it is.
struct Probe {
  const PanelKernels& kernels;
  AlignedBuffer panel, in, out;
  PanelProduct product{};

  Probe(const PanelKernels& variant, int64_t units)
      : kernels(variant),
        panel(static_cast<size_t>(units) * kPanelLanes * 4),
        in(static_cast<size_t>(kRows * units) * 4),
        out(static_cast<size_t>(kRows) * kPanelLanes * 4) {
    for (int64_t i = 0; i < units * kPanelLanes; ++i) panel.as<uint32_t>()[i] = 0x3C003C00;
    for (int64_t i = 0; i < kRows * units; ++i) in.as<uint32_t>()[i] = 0x3C003C00;
    product.rows = kRows;
    product.lanes = kPanelLanes;
    product.in = in.as<void>();
    product.stride = units * 4;
    product.panel = panel.as<void>();
    product.units = units;
    product.out = out.as<void>();
    product.out_dtype = DType::kFloat32;
    product.out_stride = kPanelLanes;
  }
  double multiply_adds() const {
    return static_cast<double>(kRows * kPanelLanes * product.units) *
           (kernels.compute == DType::kBFloat16 ? 2 : 1);
  }
};

// Multiply-adds a second of `threads` threads together: each takes the time of its own products,
// the best of `repeats` rounds.
double rate(const PanelKernels& kernels, int64_t units, int threads, int repeats, int products) {
  std::vector<double> best(static_cast<size_t>(threads));
  parallel_for(threads, threads, [&](int64_t thread) {
    const Probe probe(kernels, units);
    for (int repeat = 0; repeat < repeats; ++repeat) {
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < products; ++i) kernels.multiply(probe.product);
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      double& seen = best[static_cast<size_t>(thread)];
      seen = std::max(seen, probe.multiply_adds() * products / elapsed.count());
    }
  });
  return std::accumulate(best.begin(), best.end(), 0.0);
}

}  // namespace

double bf16_speedup() {
  static const double speedup = rate(panel_kernels_avx512bf16(), kProbeUnits, 1, 4, 8) /
                                rate(panel_kernels_avx512(), kProbeUnits, 1, 4, 8);
  return speedup;
}

double peak_gflops(DType dtype, int threads) {
  const PanelKernels* kernels = &panel_kernels_portable();
#if defined(__x86_64__)
  if (cpu_features().avx2_fma_f16c) kernels = &panel_kernels_avx2();
  if (cpu_features().avx512) kernels = &panel_kernels_avx512();
  if (dtype == DType::kBFloat16 && cpu_features().avx512_bf16 && cpu_features().avx512_vbmi)
    kernels = cpu_features().amx_bf16 ? &panel_kernels_amx() : &panel_kernels_avx512bf16();
#else
  (void)dtype;
#endif
  return 2e-9 * rate(*kernels, kMaxPanelUnits, usable_threads(threads), 10, 20);
}

}  // namespace halfbyte
