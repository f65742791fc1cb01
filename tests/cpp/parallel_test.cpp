// Threads, through the public operations: odd thread counts, callers on several threads at once (as
// Python's are once the lock is released), errors from the middle of a run.
#include <thread>

#include "halfbyte/lora_linear.h"
#include "halfbyte/nf4.h"
#include "test_support.h"

namespace halfbyte {
namespace {

using test::Buffer;
using test::contains;
using test::message_of;

constexpr int64_t kCount = 300007;

QuantizeParams params_of(Buffer& weight, Buffer& packed, Buffer& absmax, int threads) {
  QuantizeParams params;
  params.weight = weight.view();
  params.packed = packed.view();
  params.absmax = absmax.view();
  params.threads = threads;
  return params;
}

TEST(Parallel, AnyThreadCountGivesTheSameBytes) {
  Buffer weight(kCount, DType::kFloat32);
  weight.fill_normal(1);
  std::vector<uint8_t> want;
  for (int threads : {1, 0, -3, 2, 3, 7, 64}) {  // below one: one
    Buffer packed((kCount + 1) / 2, DType::kUInt8), absmax((kCount + 63) / 64, DType::kFloat32);
    quantize_4bit(params_of(weight, packed, absmax, threads));
    if (want.empty()) want = packed.contents();
    EXPECT_EQ(packed.contents(), want) << threads << " threads";
  }
}

TEST(Parallel, CallersOnSeveralThreadsDoNotMeet) {
  constexpr int64_t M = 40, N = 130, K = 96, R = 5;
  Buffer packed(N * K / 2, DType::kUInt8), absmax(N * K / 64, DType::kFloat32);
  Buffer a(R * K, DType::kFloat32), b(N * R, DType::kFloat32);
  a.fill_normal(1);
  b.fill_normal(2);
  for (int64_t i = 0; i < packed.bytes(); ++i) packed.data()[i] = static_cast<uint8_t>(i * 37);
  for (int64_t i = 0; i < absmax.count(); ++i) absmax.put(i, 1.0f);
  const auto forward = [&](uint64_t seed, int threads) {
    Buffer x(M * K, DType::kFloat32), y(M * N, DType::kFloat32);
    x.fill_normal(seed);
    LoraLinearParams p;
    p.x = x.view({M, K});
    p.weight.packed = packed.view();
    p.weight.absmax = absmax.view();
    p.out_features = N;
    p.lora_a = a.view({R, K});
    p.lora_b = b.view({N, R});
    p.y = y.view({M, N});
    p.threads = threads;
    lora_linear_forward(p);
    return y.contents();
  };
  std::vector<std::vector<uint8_t>> want;
  for (uint64_t seed = 0; seed < 4; ++seed) want.push_back(forward(seed, 1));
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> callers;
  for (uint64_t seed = 0; seed < 4; ++seed)
    callers.emplace_back([&, seed] {
      for (int i = 0; i < 20; ++i) wrong[seed] += forward(seed, 1 + i % 3) != want[seed];
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, std::vector<int>(4, 0));
}

TEST(Parallel, TheFirstBadValueIsNamedWhateverThreadFindsIt) {
  Buffer weight(kCount, DType::kFloat32);
  weight.fill_normal(1);
  for (int64_t i : {70001, 140000, 299999}) weight.as<float>()[i] = NAN;
  for (int threads : {1, 2, 5})
    for (int repeat = 0; repeat < 20; ++repeat) {
      Buffer packed((kCount + 1) / 2, DType::kUInt8), absmax((kCount + 63) / 64, DType::kFloat32);
      const std::string message =
          message_of([&] { quantize_4bit(params_of(weight, packed, absmax, threads)); });
      ASSERT_TRUE(contains(message, "flat index 70001 of")) << message;
    }
}

}  // namespace
}  // namespace halfbyte
