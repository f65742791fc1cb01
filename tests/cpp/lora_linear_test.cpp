// The LoRA linear: every variant against the reference, memory around the tensors poisoned with
// NaN, the same bits for any number of threads, errors with values.
#include "halfbyte/lora_linear.h"

#include <memory>

#include "test_support.h"

namespace halfbyte {
namespace {

using test::Buffer;
using test::contains;
using test::Forced;
using test::message_of;
using test::usable;

constexpr DType kFloats[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Shape {
  int64_t M, N, K, R;
};
std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << "M " << s.M << " N " << s.N << " K " << s.K << " R " << s.R;
}

// One layer in guarded memory; the packed bytes lie at an odd address.
struct Layer {
  Shape s;
  DType dtype;
  Buffer x, packed, absmax, bias, a, b, seed, y, t, dy, dx, da, db, dbias;
  double dropout = 0;
  int threads = 1;

  Layer(Shape shape, DType type, DType adapter, int64_t shift = 1)
      : s(shape),
        dtype(type),
        x(s.M * s.K, type, shift),
        packed(ceil_div(s.N * s.K, 2), DType::kUInt8, shift),
        absmax(ceil_div(s.N * s.K, 32), DType::kFloat32, shift),
        bias(s.N, adapter, shift),
        a(s.R * s.K, adapter, shift),
        b(s.N * s.R, adapter, shift),
        seed(1, DType::kInt64),
        y(s.M * s.N, type, shift),
        t(s.M * s.R, DType::kFloat32, shift),
        dy(s.M * s.N, type, shift),
        dx(s.M * s.K, type, shift),
        da(s.R * s.K, adapter, shift),
        db(s.N * s.R, adapter, shift),
        dbias(s.N, adapter, shift) {
    x.fill_normal(1);
    dy.fill_normal(2);
    bias.fill_normal(3);
    a.fill_normal(4, 1 / std::sqrt(static_cast<float>(s.K)));
    b.fill_normal(5);
    std::mt19937_64 random(6);
    for (int64_t i = 0; i < packed.bytes(); ++i) packed.data()[i] = static_cast<uint8_t>(random());
    for (int64_t i = 0; i < absmax.count(); ++i)
      absmax.put(i, 0.5f / std::sqrt(static_cast<float>(s.K)) * (1 + i % 3));
    *seed.as<int64_t>() = 99;
  }

  QuantizedView weight() {
    QuantizedView view;
    view.packed = packed.view();
    view.absmax = absmax.view();
    view.block_size = 32;
    return view;
  }
  LoraLinearParams forward_params() {
    LoraLinearParams p;
    p.x = x.view({s.M, s.K});
    p.weight = weight();
    p.out_features = s.N;
    p.bias = bias.view();
    if (s.R) {
      p.lora_a = a.view({s.R, s.K});
      p.lora_b = b.view({s.N, s.R});
      p.t = t.view({s.M, s.R});
    }
    p.scaling = 1.5;
    p.dropout = dropout;
    p.seed = seed.view();
    p.y = y.view({s.M, s.N});
    p.threads = threads;
    return p;
  }
  LoraLinearBackwardParams backward_params() {
    LoraLinearBackwardParams p;
    p.dy = dy.view({s.M, s.N});
    p.x = x.view({s.M, s.K});
    p.weight = weight();
    p.in_features = s.K;
    if (s.R) {
      p.lora_a = a.view({s.R, s.K});
      p.lora_b = b.view({s.N, s.R});
      p.t = t.view({s.M, s.R});
      p.d_lora_a = da.view({s.R, s.K});
      p.d_lora_b = db.view({s.N, s.R});
    }
    p.scaling = 1.5;
    p.dropout = dropout;
    p.seed = seed.view();
    p.dx = dx.view({s.M, s.K});
    p.d_bias = dbias.view();
    p.threads = threads;
    return p;
  }
  // Both passes; "" or why the variant does not take this product.
  std::string run(const std::string& variant) {
    const Forced forced("lora_linear:" + variant);
    return message_of([&] {
      lora_linear_forward(forward_params());
      lora_linear_backward(backward_params());
    });
  }
  std::vector<std::pair<const char*, Buffer*>> results() {
    return {{"y", &y}, {"t", &t}, {"dx", &dx}, {"da", &da}, {"db", &db}, {"dbias", &dbias}};
  }
};

double tolerance(DType dtype) {
  return dtype == DType::kFloat32 ? 1e-5 : dtype == DType::kBFloat16 ? 5e-3 : 2e-3;
}

// Frobenius norm of the difference over that of `want`.
double distance(Buffer& want, Buffer& got) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < want.count(); ++i) {
    difference += std::pow(got.get(i) - want.get(i), 2);
    norm += std::pow(want.get(i), 2);
  }
  return std::sqrt(difference) / std::max(std::sqrt(norm), 1e-30);
}

void compare(const std::string& variant, Shape shape, DType dtype, DType adapter, double dropout,
             bool may_refuse) {
  Layer want(shape, dtype, adapter, 0), got(shape, dtype, adapter, 1);
  want.dropout = got.dropout = dropout;
  got.threads = 2;
  ASSERT_EQ(want.run("reference"), "");
  const std::string refusal = got.run(variant);
  if (may_refuse && contains(refusal, "cannot run: ")) return;
  ASSERT_EQ(refusal, "") << variant << " " << shape;
  for (size_t i = 0; i < want.results().size(); ++i) {
    const auto [name, expected] = want.results()[i];
    Buffer* result = got.results()[i].second;
    EXPECT_LE(distance(*expected, *result), tolerance(dtype))
        << name << " of " << variant << " " << dtype_name(dtype) << " " << shape << " dropout "
        << dropout;
    EXPECT_TRUE(result->guards_hold()) << name << " of " << variant << ": wrote outside";
  }
}

TEST(LoraLinear, VariantsFollowTheReference) {
  const Shape shapes[] = {{1, 1, 1, 1},     {3, 5, 7, 2},     {17, 33, 100, 17}, {7, 64, 64, 8},
                          {13, 65, 127, 3}, {6, 130, 33, 64}, {130, 20, 70, 5},  {2, 7, 9, 0}};
  for (DType dtype : kFloats)
    for (const std::string& variant : usable(lora_linear_variants(dtype)))
      for (const Shape& shape : shapes)
        for (double dropout : {0.0, 0.4}) compare(variant, shape, dtype, dtype, dropout, true);
}

TEST(LoraLinear, NoVariantRefusesALargeProduct) {
  for (DType dtype : kFloats)
    for (const std::string& variant : usable(lora_linear_variants(dtype)))
      for (const Shape& shape :
           {Shape{40, 200, 301, 8}, Shape{9, 20, 4500, 2}, Shape{9, 4500, 20, 2}})
        compare(variant, shape, dtype, DType::kFloat32, 0.25, false);
}

TEST(LoraLinear, ReductionOverManyRows) {
  for (DType dtype : kFloats)
    for (const std::string& variant : usable(lora_linear_variants(dtype)))
      compare(variant, {4300, 9, 11, 3}, dtype, DType::kFloat32, 0.5, true);
}

// Too few panels for many threads: the reduction is cut, forward (long rows) and backward (many).
const Shape kFewPanels[] = {{20, 70, 1500, 5}, {13, 1500, 70, 5}};

TEST(LoraLinear, ReductionInParts) {
  for (const Shape& shape : kFewPanels)
    for (DType dtype : kFloats)
      for (const std::string& variant : usable(lora_linear_variants(dtype)))
        compare(variant, shape, dtype, DType::kFloat32, 0.25, true);
}

TEST(LoraLinear, TheSameBitsForAnyNumberOfThreads) {
  for (const Shape& shape : {Shape{150, 140, 130, 9}, kFewPanels[0], kFewPanels[1]})
    for (DType dtype : kFloats)
      for (const std::string& variant : usable(lora_linear_variants(dtype))) {
        Layer one(shape, dtype, DType::kFloat32);
        one.dropout = 0.1;
        ASSERT_EQ(one.run(variant), "");
        for (int threads : {2, 3, 8, 64}) {
          Layer many(shape, dtype, DType::kFloat32);
          many.dropout = 0.1;
          many.threads = threads;
          ASSERT_EQ(many.run(variant), "");
          for (size_t i = 0; i < one.results().size(); ++i)
            EXPECT_EQ(one.results()[i].second->contents(), many.results()[i].second->contents())
                << one.results()[i].first << " of " << variant << ", " << threads << " threads";
        }
      }
}

TEST(LoraLinear, InputsAreNotWritten) {
  for (DType dtype : kFloats)
    for (const std::string& variant : usable(lora_linear_variants(dtype))) {
      Layer layer({20, 70, 90, 6}, dtype, DType::kBFloat16);
      Buffer* inputs[] = {&layer.x, &layer.packed, &layer.absmax, &layer.bias,
                          &layer.a, &layer.b,      &layer.dy,     &layer.seed};
      std::vector<std::vector<uint8_t>> before;
      for (Buffer* input : inputs) before.push_back(input->contents());
      layer.run(variant);
      for (size_t i = 0; i < before.size(); ++i) {
        EXPECT_EQ(inputs[i]->contents(), before[i]) << variant << " input " << i;
        EXPECT_TRUE(inputs[i]->guards_hold()) << variant << " input " << i;
      }
    }
}

TEST(LoraLinear, GradientsThatAreNotGivenAreNotComputed) {
  for (const std::string& variant : usable(lora_linear_variants(DType::kFloat32))) {
    Layer all({20, 30, 40, 4}, DType::kFloat32, DType::kFloat32);
    ASSERT_EQ(all.run(variant), "");
    for (int wanted = 0; wanted < 4; ++wanted) {
      Layer one({20, 30, 40, 4}, DType::kFloat32, DType::kFloat32);
      const Forced forced("lora_linear:" + variant);
      lora_linear_forward(one.forward_params());
      LoraLinearBackwardParams p = one.backward_params();
      TensorView* outputs[] = {&p.dx, &p.d_lora_a, &p.d_lora_b, &p.d_bias};
      for (int i = 0; i < 4; ++i)
        if (i != wanted) *outputs[i] = TensorView();
      if (wanted != 1) p.x = TensorView();
      if (wanted != 2) p.t = TensorView();
      lora_linear_backward(p);
      for (int i = 0; i < 4; ++i) {
        Buffer* got = one.results()[i + 2].second;
        if (i == wanted) {
          EXPECT_EQ(got->contents(), all.results()[i + 2].second->contents())
              << variant << " " << i;
        } else {
          EXPECT_EQ(got->contents(), std::vector<uint8_t>(got->bytes(), 0)) << variant << " " << i;
        }
      }
    }
  }
}

TEST(LoraLinear, ZeroRowsGiveZeroGradients) {
  for (DType dtype : kFloats)
    for (const std::string& variant : usable(lora_linear_variants(dtype))) {
      Layer layer({0, 5, 7, 2}, dtype, dtype);
      for (Buffer* gradient : {&layer.da, &layer.db, &layer.dbias}) gradient->fill_normal(1);
      const std::string refusal = layer.run(variant);
      if (contains(refusal, "cannot run: ")) continue;
      ASSERT_EQ(refusal, "") << variant;
      for (Buffer* gradient : {&layer.da, &layer.db, &layer.dbias})
        EXPECT_EQ(gradient->contents(), std::vector<uint8_t>(gradient->bytes(), 0)) << variant;
    }
}

TEST(LoraLinear, TheIntermediateIsOptional) {
  for (const std::string& variant : usable(lora_linear_variants(DType::kFloat32))) {
    Layer with({20, 30, 40, 4}, DType::kFloat32, DType::kFloat32);
    Layer without({20, 30, 40, 4}, DType::kFloat32, DType::kFloat32);
    const Forced forced("lora_linear:" + variant);
    lora_linear_forward(with.forward_params());
    LoraLinearParams p = without.forward_params();
    p.t = TensorView();
    lora_linear_forward(p);
    EXPECT_EQ(with.y.contents(), without.y.contents()) << variant;
  }
}

TEST(LoraLinear, BadArgumentsSayWhatWasExpected) {
  Layer layer({3, 5, 7, 2}, DType::kFloat32, DType::kFloat32);
  const auto forward = [&](auto change) {
    LoraLinearParams p = layer.forward_params();
    change(p);
    return message_of([&] { lora_linear_forward(p); });
  };
  using F = LoraLinearParams;
  EXPECT_EQ(forward([](F&) {}), "");
  EXPECT_TRUE(contains(forward([](F& p) { p.x.shape = {21}; }), "x: expected 2 dimensions"));
  EXPECT_TRUE(contains(forward([](F& p) { p.x.dtype = DType::kInt64; }), "x: expected float32"));
  EXPECT_TRUE(
      contains(forward([](F& p) { p.out_features = 0; }), "out_features: expected at least"));
  EXPECT_TRUE(contains(forward([](F& p) { p.y.shape = {3, 6}; }), "y: expected shape [3, 5], got"));
  EXPECT_TRUE(contains(forward([](F& p) { p.y.dtype = DType::kFloat16; }), "y: expected float32"));
  EXPECT_TRUE(contains(forward([](F& p) { p.bias.shape = {4}; }), "bias: expected shape [5]"));
  EXPECT_TRUE(
      contains(forward([](F& p) { p.lora_a.shape = {2, 8}; }), "lora_a: expected shape [2, 7]"));
  EXPECT_TRUE(
      contains(forward([](F& p) { p.lora_b.shape = {2, 5}; }), "lora_b: expected shape [5, 2]"));
  EXPECT_TRUE(contains(forward([](F& p) { p.lora_b = {}; }), "expected both or neither"));
  EXPECT_TRUE(contains(forward([](F& p) { p.lora_a.shape = {513, 7}; }), "rank of 1 to 512"));
  EXPECT_TRUE(contains(forward([](F& p) { p.t.shape = {2, 3}; }), "t: expected shape [3, 2]"));
  EXPECT_TRUE(contains(forward([](F& p) { p.dropout = 1.5; }), "expected 0 <= p <= 1, got 1.5"));
  EXPECT_TRUE(contains(forward([](F& p) { p.dropout = NAN; }), "expected 0 <= p <= 1, got nan"));
  EXPECT_TRUE(
      contains(forward([](F& p) { p.dropout = 0.5, p.seed = {}; }), "seed: expected int64"));
  EXPECT_TRUE(contains(forward([](F& p) { p.weight.packed.shape = {17}; }), "packed: expected 18"));
  EXPECT_TRUE(contains(forward([](F& p) { p.x.place = {Device::kCuda, 1}; }),
                       "expected a tensor on cuda:1"));

  const auto backward = [&](auto change) {
    LoraLinearBackwardParams p = layer.backward_params();
    change(p);
    return message_of([&] { lora_linear_backward(p); });
  };
  using B = LoraLinearBackwardParams;
  EXPECT_EQ(backward([](B&) {}), "");
  EXPECT_TRUE(
      contains(backward([](B& p) { p.in_features = 0; }), "in_features: expected at least"));
  EXPECT_TRUE(contains(backward([](B& p) { p.dy = {}; }), "dy: expected float32"));
  EXPECT_TRUE(contains(backward([](B& p) { p.x = {}; }), "x: expected float32, got nothing"));
  EXPECT_TRUE(contains(backward([](B& p) { p.t = {}; }), "t: expected float32, got nothing"));
  EXPECT_TRUE(
      contains(backward([](B& p) { p.dx.dtype = DType::kFloat16; }), "dx: expected float32"));
  EXPECT_TRUE(contains(backward([](B& p) { p.dx.shape = {3, 8}; }), "dx: expected shape [3, 7]"));
  EXPECT_TRUE(
      contains(backward([](B& p) { p.d_lora_a.shape = {7, 2}; }), "d_lora_a: expected shape"));
  EXPECT_TRUE(
      contains(backward([](B& p) { p.d_lora_b.shape = {2, 5}; }), "d_lora_b: expected shape"));
  EXPECT_TRUE(contains(backward([](B& p) { p.d_bias.shape = {7}; }), "d_bias: expected shape [5]"));
}

// Without an adapter there is no gradient of one.
TEST(LoraLinear, AdapterGradientsWithoutAnAdapterAreAnError) {
  Layer layer({3, 5, 7, 2}, DType::kFloat32, DType::kFloat32);
  LoraLinearBackwardParams p = layer.backward_params();
  p.lora_a = p.lora_b = TensorView();
  EXPECT_NE(message_of([&] { lora_linear_backward(p); }), "");
}

}  // namespace
}  // namespace halfbyte
