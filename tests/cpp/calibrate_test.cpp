// Scale search and error feedback: every variant against the reference bit for bit, the reference
// against the definition in doubles, never worse than absmax, memory beyond the tensors untouched.
#include "halfbyte/calibrate.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "halfbyte/nf4.h"
#include "test_support.h"

namespace halfbyte {
namespace {

using test::Buffer;
using test::contains;
using test::Forced;
using test::message_of;
using test::usable;

constexpr CodebookId kBooks[] = {CodebookId::kNf4, CodebookId::kFp4, CodebookId::kInt4};

struct Shape {
  int64_t N, K, block;
};
// K below, at and above a block, not a multiple of it, of the panel or of the sums' lanes.
constexpr Shape kShapes[] = {{1, 1, 32},   {3, 7, 32},    {5, 64, 64},   {17, 65, 64},
                             {33, 40, 64}, {16, 129, 32}, {2, 300, 128}, {7, 72, 4096}};

int64_t blocks_of(const Shape& shape) {
  return (shape.N * shape.K + shape.block - 1) / shape.block;
}

void fill_moments(Buffer& moments, uint64_t seed) {
  moments.fill_normal(seed);
  for (int64_t k = 0; k < moments.count(); ++k) {
    const float value = moments.as<float>()[k];
    moments.put(k, k % 11 == 3 ? 0.0f : value * value * (k % 7 == 0 ? 100.0f : 1.0f));
  }
}

void search(const std::string& variant, Buffer& weight, Buffer& moments, CodebookId book,
            const Shape& shape, Buffer& scales, int threads = 1) {
  SearchScalesParams params;
  params.weight = weight.view({shape.N, shape.K});
  params.moments = moments.view();
  params.codebook = book;
  params.block_size = shape.block;
  params.scales = scales.view();
  params.threads = threads;
  const Forced forced("search_scales:" + variant);
  search_scales(params);
}

float level_of(CodebookId book, int code) {
  return codebook_levels(book)[static_cast<size_t>(code)];
}

int nearest_code(CodebookId book, float x) {
  const Codebook& table = kCodebooks[static_cast<int>(book)];
  int rank = 0;
  for (uint32_t bits : table.thresholds) {
    float threshold;
    std::memcpy(&threshold, &bits, 4);
    rank += x > threshold;
  }
  return table.code_of_rank[rank];
}

// sum of h (w - s level)^2 over a block, in doubles.
double damage(Buffer& weight, Buffer& moments, CodebookId book, const Shape& shape, int64_t block,
              float scale) {
  double sum = 0;
  const int64_t last = std::min((block + 1) * shape.block, shape.N * shape.K);
  for (int64_t i = block * shape.block; i < last; ++i) {
    const float w = static_cast<float>(weight.get(i));
    const float x = scale == 0 ? 0 : w * (1.0f / scale);
    const double e = w - static_cast<double>(level_of(book, nearest_code(book, x))) * scale;
    sum += moments.get(i % shape.K) * e * e;
  }
  return sum;
}

TEST(Calibrate, SearchVariantsMatchReferenceBitForBit) {
  for (const std::string& variant : usable(search_scales_variants()))
    for (CodebookId book : kBooks)
      for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
        for (const Shape& shape : kShapes) {
          Buffer weight(shape.N * shape.K, dtype, 1), moments(shape.K, DType::kFloat32, 1);
          weight.fill_normal(shape.K);
          for (int64_t i = 64; i < std::min<int64_t>(weight.count(), 128); ++i) weight.put(i, 0);
          fill_moments(moments, shape.N);
          Buffer expected(blocks_of(shape), DType::kFloat32),
              got(blocks_of(shape), DType::kFloat32);
          search("reference", weight, moments, book, shape, expected);
          search(variant, weight, moments, book, shape, got, 3);
          ASSERT_EQ(expected.contents(), got.contents())
              << variant << " " << dtype_name(dtype) << " " << shape.N << " x " << shape.K;
          ASSERT_TRUE(got.guards_hold());
        }
}

TEST(Calibrate, SearchIsNeverWorseThanAbsmaxAndUsesBothSigns) {
  for (CodebookId book : kBooks) {
    int negative = 0, better = 0, all = 0;
    for (const Shape& shape : kShapes) {
      Buffer weight(shape.N * shape.K, DType::kFloat32), moments(shape.K, DType::kFloat32);
      weight.fill_normal(shape.K + 1);
      fill_moments(moments, shape.N + 1);
      Buffer scales(blocks_of(shape), DType::kFloat32);
      search("reference", weight, moments, book, shape, scales);
      for (int64_t block = 0; block < blocks_of(shape); ++block) {
        float absmax = 0;
        const int64_t last = std::min((block + 1) * shape.block, weight.count());
        for (int64_t i = block * shape.block; i < last; ++i)
          absmax = std::max(absmax, std::fabs(weight.as<float>()[i]));
        const float scale = scales.as<float>()[block];
        const double plain = damage(weight, moments, book, shape, block, absmax);
        const double found = damage(weight, moments, book, shape, block, scale);
        ASSERT_LE(found, plain * (1 + 1e-5) + 1e-12) << shape.N << " x " << shape.K;
        negative += scale < 0;
        better += found < 0.98 * plain;
        ++all;
      }
    }
    EXPECT_GT(better, all / 2);
    if (book == CodebookId::kNf4) {
      EXPECT_GT(negative, all / 10);
    }
  }
}

TEST(Calibrate, ABlockOfZerosOrSubnormalsKeepsItsAbsmax) {
  const Shape shape{2, 32, 32};
  Buffer weight(64, DType::kFloat32), moments(32, DType::kFloat32), scales(2, DType::kFloat32);
  for (int64_t k = 0; k < 32; ++k) moments.put(k, 1.0f);
  for (int64_t i = 32; i < 64; ++i) weight.put(i, static_cast<float>(i) * 1e-41f);
  for (const std::string& variant : usable(search_scales_variants())) {
    search(variant, weight, moments, CodebookId::kNf4, shape, scales);
    EXPECT_EQ(scales.as<float>()[0], 0.0f) << variant;
    EXPECT_EQ(scales.as<float>()[1], weight.as<float>()[63]) << variant;
  }
}

// Everything that one call of feedback_codes reads and writes.
struct Feedback {
  Shape shape;
  Buffer weight, scales, coefficients, errors, codes;
  std::vector<int64_t> order;
  explicit Feedback(const Shape& s)
      : shape(s),
        weight(s.N * s.K, DType::kFloat32, 1),
        scales(blocks_of(s), DType::kFloat32, 1),
        coefficients(s.K * s.K, DType::kFloat32, 1),
        errors(s.N * s.K, DType::kFloat32, 1),
        codes(s.N * s.K, DType::kUInt8, 1),
        order(static_cast<size_t>(s.K)) {
    weight.fill_normal(s.K);
    scales.fill_normal(s.N, 2.0f);
    coefficients.fill_normal(s.K + s.N, 0.1f);
    if (scales.count() > 1) scales.put(1, 0.0f);
    std::iota(order.begin(), order.end(), 0);
    std::mt19937_64 random(7);
    std::shuffle(order.begin(), order.end(), random);
  }
  FeedbackCodesParams params() {
    FeedbackCodesParams made;
    made.weight = weight.view({shape.N, shape.K});
    made.scales = scales.view();
    made.coefficients = coefficients.view({shape.K, shape.K});
    made.order = TensorView(order.data(), DType::kInt64, {shape.K});
    made.block_size = shape.block;
    made.errors = errors.view({shape.N, shape.K});
    made.codes = codes.view({shape.N, shape.K});
    return made;
  }
  // A pass with feedback, then a sweep.
  void run(const std::string& variant, CodebookId book, int threads = 1) {
    const Forced forced("feedback_codes:" + variant);
    FeedbackCodesParams made = params();
    made.codebook = book;
    made.threads = threads;
    feedback_codes(made);
    made.triangular = false;
    feedback_codes(made);
  }
};

TEST(Calibrate, FeedbackVariantsMatchReferenceBitForBit) {
  for (const std::string& variant : usable(feedback_codes_variants()))
    for (CodebookId book : kBooks)
      for (const Shape& shape : kShapes) {
        Feedback expected(shape), got(shape);
        expected.run("reference", book);
        got.run(variant, book, 3);
        const std::string what = concat(variant, " ", shape.N, " x ", shape.K);
        ASSERT_EQ(expected.codes.contents(), got.codes.contents()) << what;
        ASSERT_EQ(expected.errors.contents(), got.errors.contents()) << what;
        ASSERT_TRUE(got.codes.guards_hold() && got.errors.guards_hold()) << what;
      }
}

TEST(Calibrate, FeedbackReferenceIsTheDefinition) {
  const Shape shape{9, 70, 64};
  Feedback got(shape);
  const Forced forced("feedback_codes:reference");
  feedback_codes(got.params());
  for (int64_t row = 0; row < shape.N; ++row) {
    std::vector<double> d(static_cast<size_t>(shape.K));
    for (int64_t k = 0; k < shape.K; ++k) {
      const int64_t flat = row * shape.K + got.order[static_cast<size_t>(k)];
      double t = got.weight.as<float>()[flat];
      for (int64_t j = 0; j < k; ++j)
        t += d[static_cast<size_t>(j)] * got.coefficients.as<float>()[k * shape.K + j];
      const float scale = got.scales.as<float>()[flat / shape.block];
      const int code = got.codes.as<uint8_t>()[flat];
      const double q = static_cast<double>(level_of(CodebookId::kNf4, code)) * scale;
      for (float level : codebook_levels(CodebookId::kNf4))
        ASSERT_LE(std::fabs(t - q), std::fabs(t - static_cast<double>(level) * scale) + 1e-4);
      d[static_cast<size_t>(k)] = got.weight.as<float>()[flat] - q;
      ASSERT_NEAR(got.errors.as<float>()[flat], d[static_cast<size_t>(k)], 1e-6);
    }
  }
}

TEST(Calibrate, WithoutCoefficientsCodesAreThoseOfQuantize) {
  const Shape shape{5, 96, 64};
  Feedback got(shape);
  std::memset(got.coefficients.data(), 0, static_cast<size_t>(got.coefficients.bytes()));
  Buffer packed(5 * 48, DType::kUInt8);
  QuantizeParams plain;
  plain.weight = got.weight.view();
  plain.packed = packed.view();
  plain.absmax = got.scales.view();
  quantize_4bit(plain);
  feedback_codes(got.params());
  for (int64_t i = 0; i < 480; ++i) {
    const int byte = packed.as<uint8_t>()[i / 2];
    ASSERT_EQ(got.codes.as<uint8_t>()[i], i % 2 ? byte & 15 : byte >> 4);
  }
}

TEST(Calibrate, BadInputIsNamedBeforeAnyWork) {
  const Shape shape{3, 40, 64};
  Buffer weight(120, DType::kFloat32), moments(40, DType::kFloat32), scales(2, DType::kFloat32);
  fill_moments(moments, 1);
  const auto search_message = [&] {
    return message_of(
        [&] { search("reference", weight, moments, CodebookId::kNf4, shape, scales); });
  };
  weight.put(7, std::numeric_limits<float>::quiet_NaN());
  EXPECT_EQ(search_message(), "weight: expected finite values, got nan at index 7");
  weight.put(7, 1.0f);
  moments.put(2, std::numeric_limits<float>::infinity());
  EXPECT_EQ(search_message(), "moments: expected finite values, got inf at index 2");
  moments.put(2, -1.0f);
  EXPECT_EQ(search_message(), "moments: expected values of at least 0, got -1 at index 2");

  Feedback feedback(shape);
  const auto feedback_message = [&] {
    return message_of([&] { feedback_codes(feedback.params()); });
  };
  const std::vector<uint8_t> before = feedback.codes.contents();
  feedback.order[4] = feedback.order[3];
  EXPECT_TRUE(contains(feedback_message(), "order: expected each column from 0 to 39 once"));
  feedback.order[4] = 40;
  EXPECT_TRUE(contains(feedback_message(), "got 40 at index 4"));
  std::iota(feedback.order.begin(), feedback.order.end(), 0);
  feedback.coefficients.put(9, std::numeric_limits<float>::quiet_NaN());
  EXPECT_EQ(feedback_message(), "coefficients: expected finite values, got nan at index 9");
  EXPECT_EQ(feedback.codes.contents(), before);
  FeedbackCodesParams params = feedback.params();
  params.block_size = 48;
  EXPECT_TRUE(contains(message_of([&] { feedback_codes(params); }), "block_size: expected"));
}

}  // namespace
}  // namespace halfbyte
