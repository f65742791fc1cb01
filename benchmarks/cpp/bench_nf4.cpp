// Quantize and dequantize, every variant, bytes moved a second. No torch, no Python.
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "halfbyte/nf4.h"

namespace {

using namespace halfbyte;

constexpr int64_t kN = 4096, kK = 4096, kBlock = 64;

struct Weight {
  std::vector<float> dense = std::vector<float>(kN * kK);
  std::vector<uint8_t> packed = std::vector<uint8_t>(kN * kK / 2);
  std::vector<float> absmax = std::vector<float>(kN * kK / kBlock);
  std::vector<uint16_t> out = std::vector<uint16_t>(kN * kK);

  Weight() {
    std::mt19937 random(0);
    std::normal_distribution<float> normal(0, 0.02f);
    for (float& value : dense) value = normal(random);
  }
  QuantizeParams quantize_params() {
    QuantizeParams params;
    params.weight = {dense.data(), DType::kFloat32, {kN, kK}};
    params.block_size = kBlock;
    params.packed = {packed.data(), DType::kUInt8, {kN * kK / 2}};
    params.absmax = {absmax.data(), DType::kFloat32, {kN * kK / kBlock}};
    params.threads = 2;
    return params;
  }
};

Weight& weight() {
  static Weight shared;
  return shared;
}

void quantize(benchmark::State& state, const std::string& variant) {
  setenv("HALFBYTE_FORCE_VARIANT", variant.c_str(), 1);
  const QuantizeParams params = weight().quantize_params();
  for (auto _ : state) quantize_4bit(params);
  state.SetBytesProcessed(state.iterations() * kN * kK * 4);
  unsetenv("HALFBYTE_FORCE_VARIANT");
}

void dequantize(benchmark::State& state, const std::string& variant) {
  quantize_4bit(weight().quantize_params());
  setenv("HALFBYTE_FORCE_VARIANT", variant.c_str(), 1);
  DequantizeParams params;
  params.weight.packed = {weight().packed.data(), DType::kUInt8, {kN * kK / 2}};
  params.weight.absmax = {weight().absmax.data(), DType::kFloat32, {kN * kK / kBlock}};
  params.out = {weight().out.data(), DType::kBFloat16, {kN, kK}};
  params.threads = 2;
  for (auto _ : state) dequantize_4bit(params);
  state.SetBytesProcessed(state.iterations() * kN * kK * 2);
  unsetenv("HALFBYTE_FORCE_VARIANT");
}

const bool registered = [] {
  for (const VariantStatus& variant : quantize_variants()) {
    if (!variant.why_not.empty() || variant.name == "reference") continue;
    benchmark::RegisterBenchmark(("quantize_4bit/" + variant.name).c_str(), quantize, variant.name)
        ->Unit(benchmark::kMillisecond)
        ->UseRealTime();
    benchmark::RegisterBenchmark(("dequantize_4bit/" + variant.name).c_str(), dequantize,
                                 variant.name)
        ->Unit(benchmark::kMillisecond)
        ->UseRealTime();
  }
  return true;
}();

}  // namespace
