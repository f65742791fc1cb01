// What pageable memory and the paged step refuse before any device is asked; the rest needs one:
// tests/python/cuda.
#include "halfbyte/paged.h"

#include <gtest/gtest.h>

#include <functional>

#include "halfbyte/device.h"

namespace halfbyte {
namespace {

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(Arena, SaysWhyThereIsNone) {
  const std::string reason = cuda_why_not();
  const std::string error = error_of([] { Arena(4096, 0, "auto"); });
  if (reason.empty()) {
    EXPECT_EQ(error, "");
  } else {
    EXPECT_NE(error.find(reason), std::string::npos) << error;
  }
}

TEST(Arena, DevicesAndVariantsAreListedOnlyWhereTheyAre) {
  EXPECT_EQ(cuda_devices().empty(), !cuda_why_not().empty());
  EXPECT_TRUE(cuda_variants("no such op", 0).empty());
}

TEST(PagedAdamW8, RefusesTheCpu) {
  const std::string error = error_of([] { adamw8_paged_step({}); });
  EXPECT_EQ(error, "place: expected a CUDA device, got the CPU");
}

TEST(PagedAdamW8, ChecksTheStep) {
  PagedAdamW8Params params;
  params.step.place = {Device::kCuda, 0};
  params.step.groups.push_back({-1.0});
  const std::string error = error_of([&] { adamw8_paged_step(params); });
  EXPECT_EQ(error, "group 0: lr: expected a finite number >= 0, got -1");

  params.step.groups[0].lr = 1e-3;
  EXPECT_NE(error_of([&] { adamw8_paged_step(params); }).find("bad: expected"), std::string::npos);
}

}  // namespace
}  // namespace halfbyte
