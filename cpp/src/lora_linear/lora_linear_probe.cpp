// Does bf16 arithmetic pay on this processor? cpuid says that vdpbf16ps exists, not that it is
// fast: one panel that fits L2 is multiplied both ways at first use, about 0.1 ms, minimum of
// several.
#include <chrono>
#include <vector>

#include "lora_linear_impl.h"
#include "support/parallel.h"

namespace halfbyte {
namespace {

constexpr int64_t kRows = 48, kUnits = 256;

// Seconds a unit of reduction element: lower is faster.
double seconds_per_element(const PanelKernels& kernels) {
  AlignedBuffer panel(static_cast<size_t>(kUnits) * kPanelLanes * 4);
  AlignedBuffer in(static_cast<size_t>(kRows * kUnits) * 4);
  AlignedBuffer out(static_cast<size_t>(kRows) * kPanelLanes * 4);
  for (int64_t i = 0; i < kUnits * kPanelLanes; ++i) panel.as<uint32_t>()[i] = 0x3C003C00;
  for (int64_t i = 0; i < kRows * kUnits; ++i) in.as<uint32_t>()[i] = 0x3C003C00;
  PanelProduct product{};
  product.rows = kRows;
  product.lanes = kPanelLanes;
  product.in = in.as<void>();
  product.stride = kUnits * 4;
  product.panel = panel.as<void>();
  product.units = kUnits;
  product.out = out.as<void>();
  product.out_dtype = DType::kFloat32;
  product.out_stride = kPanelLanes;
  double best = 1e9;
  for (int repeat = 0; repeat < 6; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    kernels.multiply(product);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    if (elapsed.count() < best) best = elapsed.count();
  }
  return best / static_cast<double>(kUnits * (kernels.compute == DType::kBFloat16 ? 2 : 1));
}

}  // namespace

double bf16_speedup() {
  static const double speedup =
      seconds_per_element(panel_kernels_avx512()) / seconds_per_element(panel_kernels_avx512bf16());
  return speedup;
}

}  // namespace halfbyte
