// 8-bit AdamW: every variant against the reference bit for bit, and the reference against the
// contract's promises (nearest code, never flushed, nothing changed on a bad gradient).
#include "halfbyte/adamw8.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

namespace halfbyte {
namespace {

constexpr int64_t kGuard = 64;  // bytes of poison before and after every buffer
constexpr uint8_t kPoison = 0xCD;

// A buffer at a chosen misalignment between guards.
class Guarded {
 public:
  Guarded(int64_t bytes, int64_t shift) : bytes_(bytes), shift_(shift) {
    storage_.assign(bytes + 2 * kGuard + shift, kPoison);
  }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(storage_.data() + kGuard + shift_);
  }
  const std::vector<uint8_t>& storage() const { return storage_; }
  bool guards_hold() const {
    for (int64_t i = 0; i < kGuard + shift_; ++i)
      if (storage_[i] != kPoison) return false;
    for (size_t i = kGuard + shift_ + bytes_; i < storage_.size(); ++i)
      if (storage_[i] != kPoison) return false;
    return true;
  }

 private:
  int64_t bytes_, shift_;
  std::vector<uint8_t> storage_;
};

int64_t width(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// One parameter with its gradient and state.
struct Problem {
  int64_t count;
  DType param_dtype, grad_dtype;
  AdamW8State state;
  Guarded param, grad, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax;
  float step = 0;

  Problem(int64_t n, AdamW8State kind, DType p = DType::kFloat32, DType g = DType::kFloat32,
          int64_t shift = 0)
      : count(n),
        param_dtype(p),
        grad_dtype(g),
        state(kind),
        param(n * width(p), shift * width(p)),
        grad(n * width(g), shift * width(g)),
        exp_avg(n * (coded() ? 1 : 4), shift * (coded() ? 1 : 4)),
        exp_avg_sq(n * (coded() ? 1 : 4), shift * (coded() ? 1 : 4)),
        exp_avg_absmax(blocks() * 4, shift * 4),
        exp_avg_sq_absmax(blocks() * 4, shift * 4) {
    std::memset(exp_avg.as<uint8_t>(), coded() ? kDynamic8SignedZero : 0, n * (coded() ? 1 : 4));
    std::memset(exp_avg_sq.as<uint8_t>(), 0, n * (coded() ? 1 : 4));
    std::memset(exp_avg_absmax.as<uint8_t>(), 0, blocks() * 4);
    std::memset(exp_avg_sq_absmax.as<uint8_t>(), 0, blocks() * 4);
    std::memset(param.as<uint8_t>(), 0, n * width(p));
    std::memset(grad.as<uint8_t>(), 0, n * width(g));
  }
  bool coded() const { return state != AdamW8State::kFloat32; }
  int64_t blocks() const { return (count + kAdamW8Block - 1) / kAdamW8Block; }

  AdamW8Tensor tensor() {
    AdamW8Tensor t;
    t.count = count;
    t.param = param.as<void>();
    t.grad = grad.as<void>();
    t.param_dtype = param_dtype;
    t.grad_dtype = grad_dtype;
    t.state = state;
    t.exp_avg = exp_avg.as<void>();
    t.exp_avg_sq = exp_avg_sq.as<void>();
    if (coded()) {
      t.exp_avg_absmax = exp_avg_absmax.as<float>();
      t.exp_avg_sq_absmax = exp_avg_sq_absmax.as<float>();
    }
    t.step = &step;
    return t;
  }
  bool guards_hold() const {
    return param.guards_hold() && grad.guards_hold() && exp_avg.guards_hold() &&
           exp_avg_sq.guards_hold() && exp_avg_absmax.guards_hold() &&
           exp_avg_sq_absmax.guards_hold();
  }
};

void expect_same(const Problem& a, const Problem& b, const std::string& what) {
  EXPECT_EQ(a.param.storage(), b.param.storage()) << what << ": param";
  EXPECT_EQ(a.exp_avg.storage(), b.exp_avg.storage()) << what << ": exp_avg";
  EXPECT_EQ(a.exp_avg_sq.storage(), b.exp_avg_sq.storage()) << what << ": exp_avg_sq";
  EXPECT_EQ(a.exp_avg_absmax.storage(), b.exp_avg_absmax.storage()) << what << ": exp_avg_absmax";
  EXPECT_EQ(a.exp_avg_sq_absmax.storage(), b.exp_avg_sq_absmax.storage())
      << what << ": exp_avg_sq_absmax";
  EXPECT_EQ(a.step, b.step) << what << ": step";
  EXPECT_TRUE(a.guards_hold() && b.guards_hold()) << what << ": wrote outside";
}

class ForcedVariant {
 public:
  explicit ForcedVariant(const std::string& name) {
    setenv("HALFBYTE_FORCE_VARIANT", ("adamw8:" + name).c_str(), 1);
  }
  ~ForcedVariant() { unsetenv("HALFBYTE_FORCE_VARIANT"); }
};

std::vector<std::string> usable_variants() {
  std::vector<std::string> names;
  for (const VariantStatus& row : adamw8_variants())
    if (row.why_not.empty()) names.push_back(row.name);
  return names;
}

AdamW8Result step(const std::string& variant, std::vector<Problem*> problems,
                  AdamW8Group group = {}, int threads = 1) {
  AdamW8Params params;
  for (Problem* problem : problems) params.tensors.push_back(problem->tensor());
  params.groups = {group};
  params.threads = threads;
  const ForcedVariant forced(variant);
  return adamw8_step(params);
}

// Truncated to the dtype's bits: any finite value will do.
void put(Guarded& buffer, DType dtype, int64_t i, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == DType::kFloat32) {
    buffer.as<float>()[i] = value;
  } else if (dtype == DType::kBFloat16) {
    buffer.as<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
  } else {  // sign and ten mantissa bits, exponent between 2^-14 and 2^0
    const uint32_t exponent = 1 + (bits >> 23) % 15;
    buffer.as<uint16_t>()[i] =
        static_cast<uint16_t>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 0x3FF));
  }
}

enum class Gradients { kNormal, kLogNormal, kSparse, kWild };

float draw(std::mt19937_64& random, Gradients kind) {
  std::normal_distribution<float> normal;
  switch (kind) {
    case Gradients::kNormal:
      return normal(random);
    case Gradients::kLogNormal:
      return normal(random) * std::exp(3 * normal(random));
    case Gradients::kSparse:
      return random() % 4 == 0 ? normal(random) : 0.0f;
    case Gradients::kWild:
      break;
  }
  for (;;) {  // any finite bit pattern
    const uint32_t bits = static_cast<uint32_t>(random());
    float value;
    std::memcpy(&value, &bits, 4);
    if (std::isfinite(value)) return value;
  }
}

void fill(Guarded& buffer, DType dtype, int64_t count, Gradients kind, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (int64_t i = 0; i < count; ++i) put(buffer, dtype, i, draw(random, kind));
}

// `steps` steps of the same problem under the reference and under `variant`.
void compare(const std::string& variant, int64_t count, AdamW8State state, DType p, DType g,
             int64_t shift, Gradients kind, int steps, AdamW8Group group = {}) {
  Problem expected(count, state, p, g, shift), got(count, state, p, g, shift);
  fill(expected.param, p, count, Gradients::kNormal, 1);
  fill(got.param, p, count, Gradients::kNormal, 1);
  for (int t = 0; t < steps; ++t) {
    fill(expected.grad, g, count, kind, 100 + t);
    fill(got.grad, g, count, kind, 100 + t);
    ASSERT_TRUE(step("reference", {&expected}, group).done());
    ASSERT_TRUE(step(variant, {&got}, group, 1 + t % 3).done());
    expect_same(expected, got,
                concat(variant, " count ", count, " state ", static_cast<int>(state), " param ",
                       dtype_name(p), " grad ", dtype_name(g), " shift ", shift, " kind ",
                       static_cast<int>(kind), " step ", t));
    if (testing::Test::HasFailure()) return;
  }
}

const AdamW8State kStates[] = {AdamW8State::kRatio, AdamW8State::kMoments, AdamW8State::kFloat32};

TEST(AdamW8, VariantsMatchReferenceBitForBit) {
  const std::pair<DType, DType> dtypes[] = {{DType::kFloat32, DType::kFloat32},
                                            {DType::kBFloat16, DType::kBFloat16},
                                            {DType::kBFloat16, DType::kFloat32},
                                            {DType::kFloat16, DType::kFloat16},
                                            {DType::kFloat16, DType::kFloat32}};
  for (const std::string& variant : usable_variants())
    for (int64_t count : {1, 31, 33, 255, 256, 257, 4095, 4096, 4097, 70000})
      for (AdamW8State state : kStates)
        for (const auto& [p, g] : dtypes)
          for (int64_t shift : {0, 1})
            compare(variant, count, state, p, g, shift, Gradients::kLogNormal,
                    count > 10000 ? 2 : 4);
}

TEST(AdamW8, VariantsMatchReferenceOnEveryKindOfGradient) {
  for (const std::string& variant : usable_variants())
    for (AdamW8State state : kStates)
      for (Gradients kind : {Gradients::kNormal, Gradients::kSparse, Gradients::kWild})
        for (const AdamW8Group& group : {AdamW8Group{}, AdamW8Group{1e-2, 0.5, 0.9, 0, 0.1, true},
                                         AdamW8Group{1, 0, 0, 1e-30, 0, false}})
          compare(variant, 5000, state, DType::kFloat32, DType::kFloat32, 0, kind, 6, group);
}

// With b1 = b2 = 0 the moments are m = g and sqrt(v) = |g|, and a block whose largest gradient is 1
// encodes x = g: gradients beside every threshold show the nearest code.
void expect_nearest_codes(const std::string& variant, AdamW8State state) {
  float values[256];
  const bool signed_map = state == AdamW8State::kMoments;
  dynamic8_values(signed_map ? DynamicMap::kSigned : DynamicMap::kUnsigned, values);
  std::vector<float> probes;
  for (int i = 0; i < 255; ++i) {
    const float middle = static_cast<float>((double(values[i]) + double(values[i + 1])) / 2);
    const float step = (values[i + 1] - values[i]) / 4096;  // encoders doubt their arithmetic there
    for (float x : {middle, std::nextafterf(middle, -2), std::nextafterf(middle, 2), values[i],
                    middle - 0.4f * step, middle - 0.6f * step, middle - step, middle + step,
                    middle + 1.4f * step, middle + 1.6f * step}) {
      if (probes.size() % 256 == 255) probes.push_back(1.0f);
      probes.push_back(x);
    }
  }
  while (probes.size() % 256 != 0) probes.push_back(1.0f);
  Problem problem(static_cast<int64_t>(probes.size()), state);
  std::memcpy(problem.grad.as<float>(), probes.data(), probes.size() * 4);
  ASSERT_TRUE(step(variant, {&problem}, {1e-3, 0, 0, 1e-8, 0, false}).done());
  const uint8_t* codes = (signed_map ? problem.exp_avg : problem.exp_avg_sq).as<uint8_t>();
  for (size_t i = 0; i < probes.size(); ++i) {
    int best = 0;
    for (int c = 1; c < 256; ++c)
      if (std::fabs(double(values[c]) - probes[i]) < std::fabs(double(values[best]) - probes[i]))
        best = c;
    if (!signed_map && probes[i] != 0 && best == 0) best = 1;
    ASSERT_EQ(codes[i], best) << variant << " x = " << probes[i];
  }
}

TEST(AdamW8, CodesAreTheNearestOnes) {
  for (const std::string& variant : usable_variants()) {
    expect_nearest_codes(variant, AdamW8State::kMoments);  // signed map
    expect_nearest_codes(variant, AdamW8State::kRatio);    // unsigned map
  }
}

TEST(AdamW8, ZeroGradientOnZeroStateLeavesParameterAlone) {
  for (const std::string& variant : usable_variants())
    for (AdamW8State state : kStates)
      for (double eps : {1e-8, 0.0}) {
        Problem problem(5000, state);
        fill(problem.param, DType::kFloat32, 5000, Gradients::kNormal, 3);
        problem.param.as<float>()[7] = -0.0f;
        const Problem before = problem;
        for (int t = 0; t < 3; ++t) step(variant, {&problem}, {1e-2, 0.9, 0.999, eps, 0, false});
        problem.step = 0;
        expect_same(before, problem, variant);
      }
}

TEST(AdamW8, NonZeroSecondMomentIsNeverFlushed) {
  for (const std::string& variant : usable_variants())
    for (AdamW8State state : {AdamW8State::kRatio, AdamW8State::kMoments}) {
      Problem problem(512, state);
      for (int64_t i = 0; i < 512; ++i) problem.grad.as<float>()[i] = i % 2 ? 1e-15f : 0.0f;
      problem.grad.as<float>()[0] = 1e3f;
      step(variant, {&problem});
      for (int64_t i = 1; i < 512; ++i)
        ASSERT_EQ(problem.exp_avg_sq.as<uint8_t>()[i] != 0, i % 2 == 1) << variant << " " << i;
    }
}

TEST(AdamW8, NonFiniteGradientIsFoundAndNothingChanges) {
  for (const std::string& variant : usable_variants())
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
      for (int64_t where : {0, 3, 4096, 69999}) {
        Problem first(100, AdamW8State::kFloat32, dtype, dtype);
        Problem second(70000, AdamW8State::kRatio, dtype, dtype);
        fill(second.grad, dtype, 70000, Gradients::kNormal, 9);
        if (dtype == DType::kFloat32) {
          second.grad.as<float>()[where] = -std::numeric_limits<float>::infinity();
        } else {
          second.grad.as<uint16_t>()[where] = dtype == DType::kBFloat16 ? 0xFF80 : 0xFC00;
        }
        const Problem first_before = first, second_before = second;
        const AdamW8Result result = step(variant, {&first, &second}, {}, 2);
        EXPECT_EQ(result.tensor, 1);
        EXPECT_EQ(result.index, where);
        expect_same(first_before, first, variant);
        expect_same(second_before, second, variant);
      }
}

// Plain fp32 AdamW: where it stays finite, so do we.
TEST(AdamW8, ExtremeGradientsStayFinite) {
  for (const std::string& variant : usable_variants())
    for (AdamW8State state : kStates)
      for (float size : {1e-45f, 1e-38f, 1e-30f, 1e-20f, 1e15f, 1e18f, 1e20f, 1e30f, 3.4e38f}) {
        Problem problem(1000, state);
        for (int t = 0; t < 5; ++t) {
          for (int64_t i = 0; i < 1000; ++i)
            problem.grad.as<float>()[i] = i % 3 == 0 ? 0 : i % 3 == 1 ? size : -size / (1 + i);
          step(variant, {&problem});
          for (int64_t i = 0; i < 1000; ++i) {
            ASSERT_TRUE(std::isfinite(problem.param.as<float>()[i])) << variant << " size " << size;
            ASSERT_LE(std::fabs(problem.param.as<float>()[i]), 0.05f)
                << variant << " size " << size;
          }
          for (int64_t b = 0; problem.coded() && b < problem.blocks(); ++b) {
            ASSERT_TRUE(std::isfinite(problem.exp_avg_absmax.as<float>()[b]));
            ASSERT_TRUE(std::isfinite(problem.exp_avg_sq_absmax.as<float>()[b]));
          }
        }
      }
}

TEST(AdamW8, ManyTensorsInOneCallEqualOneByOne) {
  std::vector<Problem> together, alone;
  for (int64_t count : {0, 1, 300, 16384, 16385, 0, 70000, 5, 40000}) {
    const AdamW8State state = count < 4096 ? AdamW8State::kFloat32 : AdamW8State::kRatio;
    together.emplace_back(count, state);
    fill(together.back().grad, DType::kFloat32, count, Gradients::kNormal, count);
    alone.push_back(together.back());
  }
  std::vector<Problem*> all;
  for (Problem& problem : together) all.push_back(&problem);
  for (const std::string& variant : usable_variants()) {
    for (int threads : {1, 2, 5}) {
      step(variant, all, {}, threads);
      for (Problem& problem : alone) step(variant, {&problem});
      for (size_t i = 0; i < all.size(); ++i) expect_same(alone[i], together[i], variant);
    }
  }
}

TEST(AdamW8, BadArgumentsSayWhatWasExpected) {
  Problem problem(300, AdamW8State::kRatio);
  auto message = [&](auto change) {
    AdamW8Params params;
    params.tensors = {problem.tensor()};
    params.groups = {AdamW8Group{}};
    change(params);
    try {
      adamw8_step(params);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message([](AdamW8Params&) {}), "");
  EXPECT_NE(message([](AdamW8Params& p) { p.groups[0].beta1 = 1; }).find("beta1"),
            std::string::npos);
  EXPECT_NE(message([](AdamW8Params& p) { p.groups[0].lr = NAN; }).find("lr"), std::string::npos);
  EXPECT_NE(message([](AdamW8Params& p) { p.groups[0].eps = -1; }).find("eps"), std::string::npos);
  EXPECT_NE(message([](AdamW8Params& p) { p.groups[0].weight_decay = -1; }).find("weight_decay"),
            std::string::npos);
  EXPECT_NE(message([](AdamW8Params& p) { p.tensors[0].group = 1; }).find("group"),
            std::string::npos);
  EXPECT_NE(message([](AdamW8Params& p) { p.tensors[0].grad = nullptr; }).find("grad"),
            std::string::npos);
  EXPECT_NE(
      message([](AdamW8Params& p) { p.tensors[0].grad_dtype = DType::kFloat16; }).find("grad"),
      std::string::npos);
  EXPECT_NE(
      message([](AdamW8Params& p) { p.tensors[0].param_dtype = DType::kUInt8; }).find("param"),
      std::string::npos);
  EXPECT_NE(message([](AdamW8Params& p) { p.tensors[0].exp_avg_absmax = nullptr; }).find("absmax"),
            std::string::npos);
}

TEST(AdamW8, VariantTableEndsWithTheReference) {
  const std::vector<VariantStatus> rows = adamw8_variants();
  EXPECT_EQ(rows.back().name, "reference");
  EXPECT_EQ(rows.back().why_not, "");
  const ForcedVariant forced("no_such_variant");
  Problem problem(300, AdamW8State::kRatio);
  AdamW8Params params;
  params.tensors = {problem.tensor()};
  params.groups = {AdamW8Group{}};
  EXPECT_THROW(adamw8_step(params), Error);
}

}  // namespace
}  // namespace halfbyte
