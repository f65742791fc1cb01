// The core as a guest in a process: interruption between tasks, a forked child, numbers of threads
// and shapes that nobody means.
#include <sys/wait.h>
#include <unistd.h>

#include "halfbyte/interruption.h"
#include "halfbyte/lora_linear.h"
#include "halfbyte/nf4.h"
#include "test_support.h"

namespace halfbyte {
namespace {

using test::Buffer;
using test::contains;
using test::Forced;
using test::message_of;

struct Stop {};
int checks = 0;

// Some tenths of a second on the reference variant, in tasks of 1 / 512 of that.
struct LongCall {
  static constexpr int64_t kCount = 1 << 25;
  Buffer weight{kCount, DType::kFloat32};
  Buffer packed{kCount / 2, DType::kUInt8};
  Buffer absmax{kCount / 64, DType::kFloat32};

  void run(int threads) {
    const Forced forced("reference");
    QuantizeParams params;
    params.weight = weight.view();
    params.packed = packed.view();
    params.absmax = absmax.view();
    params.threads = threads;
    quantize_4bit(params);
  }
  // Until a check ends it: one is due 0.2 s after the scope began, however fast the machine is.
  void run_on(int threads) {
    for (int i = 0; i < 1000; ++i) run(threads);
  }
};

TEST(Interruption, ACheckThatThrowsEndsALongCall) {
  LongCall call;
  for (int threads : {1, 2, 3}) {
    checks = 0;
    const Interruptible interruptible([] {
      ++checks;
      throw Stop();
    });
    EXPECT_THROW(call.run_on(threads), Stop) << threads << " threads";
    EXPECT_EQ(checks, 1);
  }
}

TEST(Interruption, ACheckMayCallOperations) {
  static std::vector<uint8_t> inner;
  LongCall call;
  Buffer small(1000, DType::kFloat32);
  small.fill_normal(1);
  static Buffer* input = &small;
  input = &small;
  {
    const Interruptible interruptible([] {
      Buffer packed(500, DType::kUInt8), absmax(16, DType::kFloat32);
      QuantizeParams params;
      params.weight = input->view();
      params.packed = packed.view();
      params.absmax = absmax.view();
      quantize_4bit(params);
      inner = packed.contents();
    });
    for (int i = 0; i < 1000 && inner.empty(); ++i) call.run(2);
  }
  EXPECT_EQ(inner.size(), 500u);
  const std::vector<uint8_t> zeros(static_cast<size_t>(LongCall::kCount / 2), 0x77);
  EXPECT_TRUE(call.packed.contents() == zeros);
}

TEST(Interruption, OnlyTheScopeIsChecked) {
  LongCall call;
  {
    const Interruptible outer([] { ++checks; });
    const Interruptible inner([] { throw Stop(); });
    EXPECT_THROW(call.run_on(1), Stop);
  }
  checks = 0;
  call.run(1);
  EXPECT_EQ(checks, 0);
}

struct SmallLayer {
  static constexpr int64_t M = 40, N = 130, K = 96, R = 5;
  Buffer packed{N * K / 2, DType::kUInt8}, absmax{N * K / 64, DType::kFloat32};
  Buffer a{R * K, DType::kFloat32}, b{N * R, DType::kFloat32};
  Buffer x{M * K, DType::kFloat32}, y{M * N, DType::kFloat32};

  SmallLayer() {
    a.fill_normal(1);
    b.fill_normal(2);
    x.fill_normal(3);
    for (int64_t i = 0; i < packed.bytes(); ++i) packed.data()[i] = static_cast<uint8_t>(i * 37);
    for (int64_t i = 0; i < absmax.count(); ++i) absmax.put(i, 1.0f);
  }
  LoraLinearParams params(int threads) {
    LoraLinearParams p;
    p.x = x.view({M, K});
    p.weight.packed = packed.view();
    p.weight.absmax = absmax.view();
    p.out_features = N;
    p.lora_a = a.view({R, K});
    p.lora_b = b.view({N, R});
    p.y = y.view({M, N});
    p.threads = threads;
    return p;
  }
  std::vector<uint8_t> forward(int threads) {
    lora_linear_forward(params(threads));
    return y.contents();
  }
};

TEST(Fork, AChildComputesOnSeveralThreads) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the thread sanitizer ends a forked child that starts threads";
#endif
  SmallLayer layer;
  const std::vector<uint8_t> want = layer.forward(2);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);  // a hang ends here
    bool right = true;
    for (int threads : {1, 2, 3, 2}) right = layer.forward(threads) == want && right;
    _exit(right ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  EXPECT_EQ(layer.forward(2), want);
}

TEST(Threads, AnyNumberIsTakenForOneThatIsSensible) {
  SmallLayer layer;
  const std::vector<uint8_t> want = layer.forward(1);
  for (int threads : {0, -1, INT32_MIN, INT32_MAX}) {
    EXPECT_EQ(layer.forward(threads), want) << threads;
    LoraLinearParams one_row = layer.params(threads);
    one_row.x.shape[0] = one_row.y.shape[0] = 1;
    lora_linear_forward(one_row);
  }
  EXPECT_GT(peak_gflops(DType::kFloat32, 0), 0);
}

TEST(EmptyReductions, GiveTheBias) {
  SmallLayer layer;
  Buffer bias(SmallLayer::N, DType::kFloat32);
  bias.fill_normal(4);
  for (const std::string& variant : test::usable(lora_linear_variants(DType::kFloat32))) {
    const Forced forced(variant);
    for (int64_t rows : {1, 9, 40}) {
      LoraLinearParams p = layer.params(1);
      p.x.shape = {rows, 0};
      p.weight.packed.shape = p.weight.absmax.shape = {0};
      p.bias = bias.view();
      p.lora_a.shape = {SmallLayer::R, 0};
      p.y.shape = {rows, SmallLayer::N};
      layer.y.fill_normal(5);
      lora_linear_forward(p);
      for (int64_t i = 0; i < rows * SmallLayer::N; ++i)
        ASSERT_EQ(layer.y.get(i), bias.get(i % SmallLayer::N)) << variant << " " << i;
    }
  }
}

TEST(HostileShapes, AreErrors) {
  SmallLayer layer;
  const auto message = [&](auto change) {
    LoraLinearParams p = layer.params(1);
    change(p);
    return message_of([&] { lora_linear_forward(p); });
  };
  EXPECT_EQ(message([](LoraLinearParams& p) { p.x.data = nullptr; }),
            "x: expected memory for float32[40, 96], got none (was its storage released?)");
  EXPECT_EQ(message([](LoraLinearParams& p) { p.x.shape = {40, -96}; }),
            "x: expected a shape of 0 to 1152921504606846975 elements, got [40, -96]");
  EXPECT_TRUE(contains(message([](LoraLinearParams& p) { p.x.shape = {INT64_MAX, INT64_MAX}; }),
                       "x: expected a shape of 0 to"));
  // Without rows nothing of x and y needs memory, but the weight's size must still be countable.
  EXPECT_TRUE(contains(message([](LoraLinearParams& p) {
                         p.lora_a = p.lora_b = {};
                         p.x.shape = {0, 64};
                         p.out_features = int64_t{1} << 58;
                         p.y.shape = {0, p.out_features};
                         p.weight.packed.shape = p.weight.absmax.shape = {0};
                       }),
                       "weight: expected a shape of 0 to"));
}

}  // namespace
}  // namespace halfbyte
