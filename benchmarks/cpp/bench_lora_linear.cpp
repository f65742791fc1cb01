// The linear layer, forward and backward, every variant, GFLOP/s. No torch, no Python.
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "halfbyte/lora_linear.h"

namespace {

using namespace halfbyte;

constexpr int64_t kN = 4096, kK = 4096, kBlock = 64;

struct Layer {
  std::vector<uint8_t> packed = std::vector<uint8_t>(kN * kK / 2);
  std::vector<float> absmax = std::vector<float>(kN * kK / kBlock, 0.02f);
  std::vector<float> x, y;
  DType dtype;
  int64_t M;

  Layer(DType activation, int64_t rows) : x(rows * kK), y(rows * kN), dtype(activation), M(rows) {
    std::mt19937 random(0);
    for (uint8_t& byte : packed) byte = static_cast<uint8_t>(random());
    // Small bf16 or fp32 values: any finite pattern times the same cost.
    auto* halves = reinterpret_cast<uint16_t*>(x.data());
    for (size_t i = 0; i < x.size() * 2; ++i)
      halves[i] = static_cast<uint16_t>(0x3C00 + random() % 256);
  }
  QuantizedView weight() const {
    QuantizedView view;
    view.packed = {packed.data(), DType::kUInt8, {kN * kK / 2}};
    view.absmax = {absmax.data(), DType::kFloat32, {kN * kK / kBlock}};
    return view;
  }
};

void forward(benchmark::State& state, const std::string& variant, DType dtype) {
  setenv("HALFBYTE_FORCE_VARIANT", variant.c_str(), 1);
  Layer layer(dtype, state.range(0));
  LoraLinearParams params;
  params.x = {layer.x.data(), dtype, {layer.M, kK}};
  params.weight = layer.weight();
  params.out_features = kN;
  params.y = {layer.y.data(), dtype, {layer.M, kN}};
  params.threads = 2;
  for (auto _ : state) lora_linear_forward(params);
  state.counters["GFLOP/s"] = benchmark::Counter(2e-9 * static_cast<double>(layer.M * kN * kK),
                                                 benchmark::Counter::kIsIterationInvariantRate);
  unsetenv("HALFBYTE_FORCE_VARIANT");
}

void backward(benchmark::State& state, const std::string& variant, DType dtype) {
  setenv("HALFBYTE_FORCE_VARIANT", variant.c_str(), 1);
  Layer layer(dtype, state.range(0));
  LoraLinearBackwardParams params;
  params.dy = {layer.x.data(), dtype, {layer.M, kN}};
  params.weight = layer.weight();
  params.in_features = kK;
  params.dx = {layer.y.data(), dtype, {layer.M, kK}};
  params.threads = 2;
  for (auto _ : state) lora_linear_backward(params);
  state.counters["GFLOP/s"] = benchmark::Counter(2e-9 * static_cast<double>(layer.M * kN * kK),
                                                 benchmark::Counter::kIsIterationInvariantRate);
  unsetenv("HALFBYTE_FORCE_VARIANT");
}

const bool registered = [] {
  for (DType dtype : {DType::kBFloat16, DType::kFloat32})
    for (const VariantStatus& variant : lora_linear_variants(dtype)) {
      if (!variant.why_not.empty() || variant.name == "reference" || variant.name == "portable")
        continue;
      const std::string suffix = std::string("/") + dtype_name(dtype) + "/" + variant.name;
      for (auto [name, run] : {std::pair{"forward", forward}, std::pair{"backward", backward}})
        benchmark::RegisterBenchmark((name + suffix).c_str(), run, variant.name, dtype)
            ->Arg(1)
            ->Arg(16)
            ->Arg(64)
            ->Arg(512)
            ->Unit(benchmark::kMillisecond)
            ->UseRealTime();
    }
  return true;
}();

}  // namespace
