// The 4-bit formats: every variant against the reference bit for bit, the reference against the
// definition in doubles, memory beyond the tensors untouched and unread.
#include "halfbyte/nf4.h"

#include <algorithm>
#include <limits>

#include "halfbyte/dynamic8_format.h"
#include "test_support.h"

namespace halfbyte {
namespace {

using test::Buffer;
using test::contains;
using test::Forced;
using test::message_of;
using test::usable;

constexpr DType kFloats[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr CodebookId kBooks[] = {CodebookId::kNf4, CodebookId::kFp4, CodebookId::kInt4};
constexpr int64_t kBlockSizes[] = {32, 64, 128, 256, 512, 1024, 2048, 4096};

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

std::vector<int64_t> counts_around(int64_t block) {
  return {0, 1, 3, block - 1, block, block + 1, 2 * block + 5, 3 * block - 31};
}

// A quantized tensor in guarded memory.
struct Quantized {
  Buffer packed, absmax;
  Quantized(int64_t count, int64_t block, int64_t shift)
      : packed(ceil_div(count, 2), DType::kUInt8, shift),
        absmax(ceil_div(count, block), DType::kFloat32, shift) {}
};

void quantize(const std::string& variant, Buffer& weight, CodebookId book, int64_t block,
              Quantized& out, int threads = 1) {
  QuantizeParams params;
  params.weight = weight.view();
  params.codebook = book;
  params.block_size = block;
  params.packed = out.packed.view();
  params.absmax = out.absmax.view();
  params.threads = threads;
  const Forced forced("quantize_4bit:" + variant);
  quantize_4bit(params);
}

// Any finite values of the dtype: random bits, with runs of zeros.
void fill_wild(Buffer& buffer, DType dtype, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (int64_t i = 0; i < buffer.count(); ++i) {
    do {
      const uint32_t bits = static_cast<uint32_t>(random());
      if (dtype == DType::kFloat32) {
        buffer.as<uint32_t>()[i] = bits;
      } else {
        buffer.as<uint16_t>()[i] = static_cast<uint16_t>(bits);
      }
    } while (!std::isfinite(buffer.get(i)));
    if (i % 200 < 70) buffer.put(i, 0.0f);
  }
}

TEST(Nf4, QuantizeVariantsMatchReferenceBitForBit) {
  for (const std::string& variant : usable(quantize_variants()))
    for (CodebookId book : kBooks)
      for (DType dtype : kFloats)
        for (int64_t block : kBlockSizes)
          for (int64_t count : counts_around(block))
            for (int64_t shift : {0, 1}) {
              Buffer weight(count, dtype, shift);
              if (count % 2) {
                weight.fill_normal(count + block);
              } else {
                fill_wild(weight, dtype, count + block);
              }
              const std::vector<uint8_t> before = weight.contents();
              Quantized expected(count, block, 0), got(count, block, shift);
              quantize("reference", weight, book, block, expected);
              quantize(variant, weight, book, block, got, 2);
              const std::string what =
                  concat(variant, " book ", static_cast<int>(book), " ", dtype_name(dtype),
                         " count ", count, " block ", block);
              ASSERT_EQ(expected.packed.contents(), got.packed.contents()) << what;
              ASSERT_EQ(expected.absmax.contents(), got.absmax.contents()) << what;
              ASSERT_TRUE(got.packed.guards_hold() && got.absmax.guards_hold()) << what;
              ASSERT_EQ(weight.contents(), before) << what;
            }
}

TEST(Nf4, ReferenceIsTheDefinition) {
  for (CodebookId book : kBooks) {
    const Codebook& table = kCodebooks[static_cast<int>(book)];
    Buffer weight(1000, DType::kFloat32);
    weight.fill_normal(5);
    for (int64_t i = 128; i < 192; ++i) weight.put(i, 0.0f);
    Quantized out(1000, 64, 0);
    quantize("reference", weight, book, 64, out);
    for (int64_t i = 0; i < 1000; ++i) {
      float absmax = 0;
      const int64_t first = i / 64 * 64;
      for (int64_t j = first; j < std::min<int64_t>(first + 64, 1000); ++j)
        absmax = std::max(absmax, std::fabs(weight.as<float>()[j]));
      ASSERT_EQ(out.absmax.as<float>()[i / 64], absmax);
      const float x = absmax > 0 ? weight.as<float>()[i] * (1.0f / absmax) : 0.0f;
      int rank = 0;
      for (uint32_t threshold : table.thresholds) rank += x > float_of(threshold);
      const int byte = out.packed.as<uint8_t>()[i / 2];
      ASSERT_EQ(i % 2 ? byte & 15 : byte >> 4, table.code_of_rank[rank]) << table.name << " " << i;
    }
  }
}

TEST(Nf4, CodeBooksAreOrderedAndThresholdsAreMidpoints) {
  for (const Codebook& book : kCodebooks) {
    for (int rank = 0; rank < 15; ++rank) {
      const float low = float_of(book.levels[book.code_of_rank[rank]]);
      const float high = float_of(book.levels[book.code_of_rank[rank + 1]]);
      EXPECT_LE(low, high) << book.name << " " << rank;
      EXPECT_EQ(float_of(book.thresholds[rank]), (low + high) / 2) << book.name << " " << rank;
    }
    int zero_rank = 0;
    for (uint32_t threshold : book.thresholds) zero_rank += 0.0f > float_of(threshold);
    EXPECT_EQ(book.code_of_rank[zero_rank], book.zero_code) << book.name;
    EXPECT_EQ(float_of(book.levels[book.zero_code]), 0.0f) << book.name;
    EXPECT_EQ(codebook_levels(codebook_by_name(book.name)).size(), 16u);
  }
}

TEST(Nf4, DequantizeVariantsMatchReferenceBitForBit) {
  std::mt19937_64 random(3);
  for (const std::string& variant : usable(dequantize_variants()))
    for (DType dtype : kFloats)
      for (int64_t block : {32, 64, 512, 4096})
        for (int64_t count : counts_around(block))
          for (int64_t shift : {0, 1, 3})
            for (bool nested : {false, true}) {
              const int64_t blocks = ceil_div(count, block), groups = ceil_div(blocks, 256);
              Buffer packed(ceil_div(count, 2), DType::kUInt8, shift);
              Buffer absmax(blocks, nested ? DType::kUInt8 : DType::kFloat32, shift);
              Buffer nested_absmax(groups, DType::kFloat32, shift);
              Buffer offset(1, DType::kFloat32), levels(16, DType::kFloat32, shift);
              for (Buffer* bytes : {&packed, &absmax})
                for (int64_t i = 0; i < bytes->bytes(); ++i)
                  bytes->data()[i] = static_cast<uint8_t>(random());
              if (!nested)  // any exponent but the largest: finite products
                for (int64_t i = 0; i < blocks; ++i) absmax.as<uint32_t>()[i] &= 0x7EFFFFFFu;
              nested_absmax.fill_normal(count + 1);
              offset.put(0, 3.5f);
              levels.fill_normal(block);
              DequantizeParams params;
              params.weight.packed = packed.view();
              params.weight.absmax = absmax.view();
              params.weight.nested_absmax = nested_absmax.view();
              params.weight.offset = offset.view();
              params.weight.block_size = block;
              params.weight.codebook = CodebookId::kFp4;
              if (shift == 1) params.weight.levels = levels.view();
              Buffer expected(count, dtype), got(count, dtype, shift);
              params.out = expected.view();
              {
                const Forced forced("dequantize_4bit:reference");
                dequantize_4bit(params);
              }
              params.out = got.view();
              params.threads = 2;
              {
                const Forced forced("dequantize_4bit:" + variant);
                dequantize_4bit(params);
              }
              ASSERT_EQ(expected.contents(), got.contents())
                  << variant << " " << dtype_name(dtype) << " count " << count << " block " << block
                  << " shift " << shift << " nested " << nested;
              ASSERT_TRUE(got.guards_hold()) << variant;
            }
}

TEST(Nf4, FirstNonFiniteValueIsNamed) {
  for (const std::string& variant : usable(quantize_variants()))
    for (DType dtype : kFloats)
      for (int64_t where : {0, 63, 64, 31071, 199999}) {
        Buffer weight(200000, dtype);
        weight.fill_normal(1);
        for (int64_t i : {where, std::min<int64_t>(where + 70000, 199999)}) {
          if (dtype == DType::kFloat32) {
            weight.as<float>()[i] = -std::numeric_limits<float>::infinity();
          } else {
            weight.as<uint16_t>()[i] = dtype == DType::kBFloat16 ? 0xFF80 : 0xFC00;
          }
        }
        Quantized out(200000, 64, 0);
        const std::string message =
            message_of([&] { quantize(variant, weight, CodebookId::kNf4, 64, out, 2); });
        EXPECT_TRUE(contains(message, concat("-inf at flat index ", where, " of ")))
            << variant << " " << message;
      }
}

TEST(Nf4, BadArgumentsSayWhatWasExpected) {
  Buffer weight(100, DType::kFloat32);
  Quantized out(100, 64, 0);
  const auto quantize_message = [&](auto change) {
    QuantizeParams params;
    params.weight = weight.view();
    params.packed = out.packed.view();
    params.absmax = out.absmax.view();
    change(params);
    return message_of([&] { quantize_4bit(params); });
  };
  using Q = QuantizeParams;
  EXPECT_EQ(quantize_message([](Q&) {}), "");
  for (int64_t block : {0, 16, 63, 8192, -64})
    EXPECT_TRUE(contains(quantize_message([&](Q& p) { p.block_size = block; }),
                         concat("from 32 to 4096, got ", block)));
  EXPECT_TRUE(contains(quantize_message([](Q& p) { p.weight = {}; }), "weight: expected float32"));
  EXPECT_TRUE(
      contains(quantize_message([](Q& p) { p.weight.dtype = DType::kInt64; }), "int64[100]"));
  EXPECT_TRUE(contains(quantize_message([](Q& p) { p.weight.place = {Device::kCuda, 1}; }),
                       "expected a tensor on cuda:1"));
  EXPECT_TRUE(contains(quantize_message([](Q& p) { p.packed.shape = {49}; }),
                       "packed: expected shape [50], got uint8[49]"));
  EXPECT_TRUE(contains(quantize_message([](Q& p) { p.absmax.shape = {3}; }),
                       "absmax: expected shape [2], got float32[3]"));
  EXPECT_TRUE(contains(message_of([] { codebook_by_name("nf5"); }), "got 'nf5'"));

  Buffer codes(2, DType::kUInt8), nested(1, DType::kFloat32), offset(1, DType::kFloat32);
  Buffer levels(16, DType::kFloat32), map(256, DType::kFloat32);
  const auto bits_message = [&](auto change) {
    QuantizedView view;
    view.packed = out.packed.view();
    view.absmax = codes.view();
    view.nested_absmax = nested.view();
    view.offset = offset.view();
    change(view);
    return message_of([&] { checked_bits(view, 100); });
  };
  using V = QuantizedView;
  EXPECT_EQ(bits_message([](V&) {}), "");
  EXPECT_TRUE(contains(bits_message([](V& v) { v.packed.shape = {51}; }), "packed: expected 50"));
  EXPECT_TRUE(contains(bits_message([](V& v) { v.absmax.shape = {1}; }), "absmax: expected shape"));
  EXPECT_TRUE(contains(bits_message([](V& v) { v.nested_absmax = {}; }), "nested_absmax"));
  EXPECT_TRUE(contains(bits_message([](V& v) { v.offset = {}; }), "offset"));
  EXPECT_TRUE(contains(
      bits_message([&](V& v) { v.levels = TensorView(levels.data(), DType::kFloat32, {15}); }),
      "levels: expected shape [16]"));
  EXPECT_TRUE(contains(
      bits_message([&](V& v) { v.nested_map = TensorView(map.data(), DType::kFloat32, {255}); }),
      "nested_map: expected shape [256]"));
}

TEST(Nf4, DoubleQuantizationTakesTheNearestCode) {
  float values[256];
  dynamic8_values(DynamicMap::kSigned, values);
  for (int64_t blocks : {0, 1, 255, 256, 257, 1500}) {
    Buffer absmax(blocks, DType::kFloat32), offset(1, DType::kFloat32);
    Buffer codes(blocks, DType::kUInt8, 1), nested(ceil_div(blocks, 256), DType::kFloat32, 1);
    absmax.fill_normal(blocks + 1);
    offset.put(0, 0.125f);
    double_quantize({absmax.view(), offset.view(), codes.view(), nested.view(), 2});
    for (int64_t i = 0; i < blocks; ++i) {
      const float scale = nested.as<float>()[i / 256];
      const float x = (absmax.as<float>()[i] - 0.125f) * (1.0f / scale);
      ASSERT_LE(std::fabs(absmax.as<float>()[i] - 0.125f), scale);
      const double distance = std::fabs(values[codes.as<uint8_t>()[i]] - static_cast<double>(x));
      for (float value : values)
        ASSERT_LE(distance, std::fabs(value - static_cast<double>(x))) << i << " " << x;
    }
    ASSERT_TRUE(codes.guards_hold() && nested.guards_hold());
  }
}

TEST(Nf4, DynamicMapsAreSortedAndEncodeEveryFloatToTheNearest) {
  for (DynamicMap map : {DynamicMap::kSigned, DynamicMap::kUnsigned}) {
    float values[256], thresholds[255];
    dynamic8_values(map, values);
    dynamic8_thresholds(values, thresholds);
    for (int i = 0; i < 255; ++i) ASSERT_LT(values[i], values[i + 1]);
    EXPECT_EQ(values[255], 1.0f);
    EXPECT_EQ(values[map == DynamicMap::kSigned ? kDynamic8SignedZero : 0], 0.0f);
    std::mt19937_64 random(1);
    for (int trial = 0; trial < 100000; ++trial) {
      float x = float_of(static_cast<uint32_t>(random()));
      if (trial % 2) x = values[random() % 255] * 0.5f + values[random() % 255] * 0.5f;
      if (!(std::fabs(x) <= 2)) continue;  // beyond, doubles cannot tell neighbours apart
      const int code = dynamic8_code(thresholds, x);
      const double distance = std::fabs(values[code] - static_cast<double>(x));
      if (code > 0) {  // a tie goes down
        ASSERT_LT(distance, std::fabs(values[code - 1] - static_cast<double>(x))) << x;
      }
      if (code < 255) {
        ASSERT_LE(distance, std::fabs(values[code + 1] - static_cast<double>(x))) << x;
      }
    }
  }
  float values[256];
  dynamic8_values(DynamicMap::kUnsigned, values);
  EXPECT_FLOAT_EQ(values[1], 3.25e-7f);
  dynamic8_values(DynamicMap::kSigned, values);
  EXPECT_FLOAT_EQ(values[0], -0.99296875f);
}

// Sizes and indices that do not fit 32 bits, without the memory: a block index beyond 2^31 elements
// is looked up through a view whose base lies that far before real memory would be out of bounds,
// so only the arithmetic of the format header is checked here (the kernels run at that size in
// Python).
TEST(Nf4, IndexArithmeticIsSixtyFourBit) {
  const int64_t count = (int64_t{1} << 33) + 7;
  QuantizedView view;
  uint8_t byte = 0;
  float scale = 0;
  view.packed = TensorView(&byte, DType::kUInt8, {ceil_div(count, 2)});
  view.absmax = TensorView(&scale, DType::kFloat32, {ceil_div(count, 4096)});
  view.block_size = 4096;
  const Nf4Bits bits = checked_bits(view, count);
  EXPECT_EQ(bits.count, count);
  EXPECT_EQ(bits.block_shift, 12);
  view.packed.shape = {ceil_div(count, 2) & 0xFFFFFFFF};
  EXPECT_TRUE(
      contains(message_of([&] { checked_bits(view, count); }), "packed: expected 4294967300"));
}

}  // namespace
}  // namespace halfbyte
