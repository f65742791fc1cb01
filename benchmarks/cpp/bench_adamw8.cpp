// One 8-bit AdamW step over 4 M parameters in 200 tensors: every variant and state, by threads.
// GB/s counts what a step must move: parameter and state read and written, gradient read once.
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "halfbyte/adamw8.h"

namespace {

using namespace halfbyte;

constexpr int64_t kElements = 20000, kTensors = 200;

struct Parameter {
  std::vector<float> param, grad, m, v, m_absmax, v_absmax;
  std::vector<uint8_t> m_codes, v_codes;
  float step = 0;

  Parameter(AdamW8State state, std::mt19937& random) : param(kElements), grad(kElements) {
    std::normal_distribution<float> normal;
    for (float& value : grad) value = 1e-3f * normal(random);
    if (state == AdamW8State::kFloat32) {
      m.resize(kElements);
      v.resize(kElements);
      return;
    }
    m_codes.assign(kElements, kDynamic8SignedZero);
    v_codes.assign(kElements, 0);
    m_absmax.resize((kElements + kAdamW8Block - 1) / kAdamW8Block);
    v_absmax.resize(m_absmax.size());
  }

  AdamW8Tensor tensor(AdamW8State state) {
    AdamW8Tensor t;
    t.count = kElements;
    t.param = param.data();
    t.grad = grad.data();
    t.state = state;
    const bool coded = state != AdamW8State::kFloat32;
    t.exp_avg = coded ? static_cast<void*>(m_codes.data()) : m.data();
    t.exp_avg_sq = coded ? static_cast<void*>(v_codes.data()) : v.data();
    t.exp_avg_absmax = coded ? m_absmax.data() : nullptr;
    t.exp_avg_sq_absmax = coded ? v_absmax.data() : nullptr;
    t.step = &step;
    return t;
  }
};

void adamw8(benchmark::State& bench, const std::string& variant, AdamW8State state) {
  setenv("HALFBYTE_FORCE_VARIANT", ("adamw8:" + variant).c_str(), 1);
  std::mt19937 random(0);
  std::vector<Parameter> parameters;
  parameters.reserve(kTensors);
  for (int64_t i = 0; i < kTensors; ++i) parameters.emplace_back(state, random);
  AdamW8Params params;
  for (Parameter& parameter : parameters) params.tensors.push_back(parameter.tensor(state));
  params.groups = {AdamW8Group{}};
  params.threads = static_cast<int>(bench.range(0));
  for (auto _ : bench) adamw8_step(params);
  const double bytes = 12 + 2 * (state == AdamW8State::kFloat32 ? 8 : 2.03125);
  bench.counters["GB/s"] = benchmark::Counter(1e-9 * bytes * kElements * kTensors,
                                              benchmark::Counter::kIsIterationInvariantRate);
  unsetenv("HALFBYTE_FORCE_VARIANT");
}

const bool registered = [] {
  const std::pair<const char*, AdamW8State> states[] = {{"ratio", AdamW8State::kRatio},
                                                        {"moments", AdamW8State::kMoments},
                                                        {"float32", AdamW8State::kFloat32}};
  for (const VariantStatus& variant : adamw8_variants()) {
    if (!variant.why_not.empty()) continue;
    for (const auto& [name, state] : states)
      benchmark::RegisterBenchmark(("adamw8/" + variant.name + "/" + name).c_str(), adamw8,
                                   variant.name, state)
          ->Arg(1)
          ->Arg(2)
          ->Unit(benchmark::kMillisecond)
          ->UseRealTime();
  }
  return true;
}();

}  // namespace
