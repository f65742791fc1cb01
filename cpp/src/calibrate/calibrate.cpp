// Checks, threading and the variant tables of search_scales and feedback_codes.
#include "halfbyte/calibrate.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "calibrate_impl.h"
#include "halfbyte/nf4.h"
#include "support/cpu_features.h"
#include "support/parallel.h"
#include "support/scalar.h"

namespace halfbyte {
namespace {

constexpr int64_t kElementsPerTask = 1 << 14;

struct SearchScalesRun {
  SearchScalesArgs args;
  int threads;
};

template <SearchBlocks search_blocks>
void run_search(const SearchScalesRun& run) {
  const int64_t blocks = ceil_div(run.args.count, run.args.block_size);
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / run.args.block_size);
  const size_t room = 2 * ceil_div(run.args.block_size, kSumLanes) * kSumLanes * sizeof(float);
  parallel_for(ceil_div(blocks, per_task), run.threads, [&](int64_t task) {
    const int64_t begin = task * per_task;
    search_blocks(run.args, begin, std::min(begin + per_task, blocks),
                  static_cast<float*>(thread_scratch(ScratchSlot::kPanel, room)));
  });
}

struct FeedbackCodesRun {
  FeedbackCodesArgs args;
  int threads;
};

template <FeedbackTile feedback_tile>
void run_feedback(const FeedbackCodesRun& run) {
  const size_t room = kFeedbackRows * run.args.columns * sizeof(float);
  parallel_for(ceil_div(run.args.rows, kFeedbackRows), run.threads, [&](int64_t tile) {
    feedback_tile(run.args, tile * kFeedbackRows,
                  static_cast<float*>(thread_scratch(ScratchSlot::kPanel, room)));
  });
}

const Variant<SearchScalesRun> kSearchTable[] = {
#if defined(__x86_64__)
    {"avx512", needs_avx512, run_search<search_blocks_avx512>},
    {"avx2", needs_avx2, run_search<search_blocks_avx2>},
#endif
    {"portable", always, run_search<search_blocks_portable>},
    {"reference", always, run_search<search_blocks_reference>},
};

const Variant<FeedbackCodesRun> kFeedbackTable[] = {
#if defined(__x86_64__)
    {"avx512", needs_avx512, run_feedback<feedback_tile_avx512>},
    {"avx2", needs_avx2, run_feedback<feedback_tile_avx2>},
#endif
    {"portable", always, run_feedback<feedback_tile_portable>},
    {"reference", always, run_feedback<feedback_tile_reference>},
};

CodeTable code_table(CodebookId id) {
  const Codebook& book = kCodebooks[static_cast<int>(id)];
  CodeTable table;
  std::memcpy(table.levels, book.levels, sizeof(table.levels));
  std::memcpy(table.thresholds, book.thresholds, sizeof(table.thresholds));
  std::memcpy(table.code_of_rank, book.code_of_rank, sizeof(table.code_of_rank));
  return table;
}

void check_block_size(int64_t block_size) {
  HALFBYTE_CHECK(block_size >= kMinBlockSize && block_size <= kMaxBlockSize &&
                     (block_size & (block_size - 1)) == 0,
                 "block_size: expected a power of two from 32 to 4096, got ", block_size);
}

void check_matrix(const char* name, const TensorView& view) {
  HALFBYTE_CHECK(view.shape.size() == 2, name, ": expected shape [N, K], got ", describe(view));
}

void check_cpu(const char* name, const TensorView& view) {
  HALFBYTE_CHECK(!view.place.is_cuda(), name, ": expected a tensor on the CPU, got one on CUDA");
}

void check_finite(const char* name, const TensorView& view) {
  const int64_t count = view.numel();
  for (int64_t i = 0; i < count; ++i) {
    const float value = load_element(view.data, view.dtype, i);
    HALFBYTE_CHECK(std::isfinite(value), name, ": expected finite values, got ", value,
                   " at index ", i);
  }
}

void check_permutation(const TensorView& order) {
  const int64_t count = order.numel();
  std::vector<bool> seen(static_cast<size_t>(count));
  for (int64_t k = 0; k < count; ++k) {
    const int64_t column = order.as<int64_t>()[k];
    const bool fits = column >= 0 && column < count && !seen[static_cast<size_t>(column)];
    HALFBYTE_CHECK(fits, "order: expected each column from 0 to ", count - 1, " once, got ", column,
                   " at index ", k);
    seen[static_cast<size_t>(column)] = true;
  }
}

}  // namespace

void search_scales(const SearchScalesParams& params) {
  const TensorView& weight = params.weight;
  check_block_size(params.block_size);
  check_dtype("weight", weight, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  check_matrix("weight", weight);
  check_cpu("weight", weight);
  check_tensor("moments", params.moments, {DType::kFloat32}, {weight.shape[1]});
  check_tensor("scales", params.scales, {DType::kFloat32},
               {ceil_div(weight.numel(), params.block_size)});
  check_places("weight", weight.place, {{"moments", params.moments}, {"scales", params.scales}});
  check_finite("weight", weight);
  check_finite("moments", params.moments);
  for (int64_t k = 0; k < weight.shape[1]; ++k) {
    const float moment = params.moments.as<float>()[k];
    HALFBYTE_CHECK(moment >= 0, "moments: expected values of at least 0, got ", moment,
                   " at index ", k);
  }
  const SearchScalesRun run{
      {weight.data, weight.dtype, params.moments.as<float>(), weight.numel(), weight.shape[1],
       params.block_size, code_table(params.codebook), params.scales.as<float>()},
      params.threads};
  select_variant("search_scales", kSearchTable, run).run(run);
}

void feedback_codes(const FeedbackCodesParams& params) {
  const TensorView& weight = params.weight;
  check_block_size(params.block_size);
  check_dtype("weight", weight, {DType::kFloat32});
  check_matrix("weight", weight);
  check_cpu("weight", weight);
  const int64_t N = weight.shape[0], K = weight.shape[1];
  check_tensor("scales", params.scales, {DType::kFloat32}, {ceil_div(N * K, params.block_size)});
  check_tensor("coefficients", params.coefficients, {DType::kFloat32}, {K, K});
  check_tensor("order", params.order, {DType::kInt64}, {K});
  check_tensor("errors", params.errors, {DType::kFloat32}, {N, K});
  check_tensor("codes", params.codes, {DType::kUInt8}, {N, K});
  check_places("weight", weight.place,
               {{"scales", params.scales},
                {"coefficients", params.coefficients},
                {"order", params.order},
                {"errors", params.errors},
                {"codes", params.codes}});
  check_permutation(params.order);
  check_finite("weight", weight);
  check_finite("scales", params.scales);
  check_finite("coefficients", params.coefficients);
  check_finite("errors", params.errors);
  FeedbackCodesRun run{
      {weight.as<float>(), params.scales.as<float>(), params.coefficients.as<float>(),
       params.order.as<int64_t>(), N, K, 0, params.triangular, code_table(params.codebook),
       params.errors.as<float>(), params.codes.as<uint8_t>()},
      params.threads};
  while ((int64_t{1} << run.args.block_shift) < params.block_size) ++run.args.block_shift;
  select_variant("feedback_codes", kFeedbackTable, run).run(run);
}

std::vector<VariantStatus> search_scales_variants() {
  return list_variants("search_scales", kSearchTable, SearchScalesRun{});
}

std::vector<VariantStatus> feedback_codes_variants() {
  return list_variants("feedback_codes", kFeedbackTable, FeedbackCodesRun{});
}

}  // namespace halfbyte
