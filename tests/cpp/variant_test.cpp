// Dispatch: tables with reasons, forced variants, errors that say what was expected.
#include "halfbyte/variant.h"

#include <set>

#include "halfbyte/adamw8.h"
#include "halfbyte/device.h"
#include "halfbyte/lora_linear.h"
#include "halfbyte/nf4.h"
#include "test_support.h"

namespace halfbyte {
namespace {

using test::contains;
using test::Forced;
using test::message_of;

using Rows = std::vector<VariantStatus>;

std::vector<std::pair<std::string, Rows>> every_table() {
  return {{"quantize_4bit", quantize_variants()},
          {"dequantize_4bit", dequantize_variants()},
          {"lora_linear", lora_linear_variants(DType::kFloat32)},
          {"lora_linear", lora_linear_variants(DType::kBFloat16)},
          {"lora_linear", lora_linear_variants(DType::kFloat16)},
          {"adamw8", adamw8_variants()}};
}

std::string chosen(const Rows& rows) {
  std::string name;
  for (const VariantStatus& row : rows)
    if (row.chosen) name += row.name;
  return name;
}

TEST(Variant, TablesEndWithTheReferenceAndChooseTheFirstThatFits) {
  for (const auto& [op, rows] : every_table()) {
    EXPECT_EQ(rows.back().name, "reference") << op;
    EXPECT_EQ(rows.back().why_not, "") << op;
    std::set<std::string> names;
    std::string first;
    for (const VariantStatus& row : rows) {
      EXPECT_TRUE(names.insert(row.name).second) << op << " " << row.name << " twice";
      if (first.empty() && row.why_not.empty()) first = row.name;
    }
    EXPECT_EQ(chosen(rows), first) << op;
  }
}

TEST(Variant, EveryNameCanBeForcedOrSaysWhyNot) {
  const auto tables = every_table();
  for (size_t i = 0; i < tables.size(); ++i)
    for (const VariantStatus& row : tables[i].second) {
      const Forced forced(tables[i].first + ":" + row.name);
      const auto again = every_table();
      EXPECT_EQ(chosen(again[i].second), row.why_not.empty() ? row.name : "") << row.name;
    }
}

TEST(Variant, AForcedNameThatAnOpLacksIsFineForThatOp) {
  const Forced forced("avx512bf16");
  EXPECT_NE(chosen(quantize_variants()), "");
  EXPECT_NE(chosen(quantize_variants()), "avx512bf16");
}

TEST(Variant, SettingsAreListsOfOpAndName) {
  {
    const Forced forced("quantize_4bit:portable,dequantize_4bit:reference");
    EXPECT_EQ(chosen(quantize_variants()), "portable");
    EXPECT_EQ(chosen(dequantize_variants()), "reference");
  }
  {
    const Forced forced("reference,quantize_4bit:portable");
    EXPECT_EQ(chosen(quantize_variants()), "portable");
    EXPECT_EQ(chosen(dequantize_variants()), "reference");
  }
  {
    const Forced forced("");
    EXPECT_EQ(forced_variant("quantize_4bit"), "");
  }
  EXPECT_EQ(forced_variant("quantize_4bit"), "");
}

struct Numbers {
  int value;
  mutable std::string ran;
};
std::string needs_even(const Numbers& n) {
  return n.value % 2 ? concat("needs an even value, got ", n.value) : "";
}
std::string needs_large(const Numbers& n) {
  return n.value < 10 ? concat("needs 10 or more, got ", n.value) : "";
}
void run_even(const Numbers& n) {
  n.ran = "even";
}
void run_large(const Numbers& n) {
  n.ran = "large";
}
const Variant<Numbers> kTable[] = {{"avx2", needs_even, run_even},
                                   {"avx512", needs_large, run_large}};

TEST(Variant, SelectTakesTheFirstThatFitsOrRaisesWithEverySentence) {
  Numbers both{12, ""}, large{11, ""}, none{3, ""};
  select_variant("numbers", kTable, both).run(both);
  EXPECT_EQ(both.ran, "even");
  select_variant("numbers", kTable, large).run(large);
  EXPECT_EQ(large.ran, "large");
  const std::string message = message_of([&] { select_variant("numbers", kTable, none); });
  EXPECT_TRUE(contains(message, "numbers: no variant fits")) << message;
  EXPECT_TRUE(contains(message, "avx2: needs an even value, got 3")) << message;
  EXPECT_TRUE(contains(message, "avx512: needs 10 or more, got 3")) << message;
}

TEST(Variant, AForcedVariantThatCannotRunRaisesItsSentence) {
  Numbers odd{13, ""};
  const Forced forced("numbers:avx2");
  const std::string message = message_of([&] { select_variant("numbers", kTable, odd); });
  EXPECT_EQ(message, "numbers: variant 'avx2' cannot run: needs an even value, got 13");
}

TEST(Variant, AnUnknownNameIsAnErrorThatListsTheKnownOnes) {
  Numbers even{12, ""};
  for (const char* setting : {"mmx", "numbers:mmx"}) {
    const Forced forced(setting);
    const std::string message = message_of([&] { select_variant("numbers", kTable, even); });
    EXPECT_TRUE(contains(message, "HALFBYTE_FORCE_VARIANT")) << message;
    EXPECT_TRUE(contains(message, "reference")) << message;
    EXPECT_TRUE(contains(message, "'mmx'")) << message;
  }
}

TEST(Variant, EveryNameInATableIsKnown) {
  for (const auto& [op, rows] : every_table())
    for (const VariantStatus& row : rows)
      EXPECT_EQ(message_of([&] { check_forced_name("another_op", row.name); }), "") << row.name;
}

TEST(Variant, FeaturesAreListedAndCudaSaysWhy) {
  EXPECT_GE(cpu_feature_list().size(), 5u);
  const std::string reason = cuda_why_not();
  EXPECT_TRUE(reason.empty() || reason.size() > 20) << reason;
}

}  // namespace
}  // namespace halfbyte
