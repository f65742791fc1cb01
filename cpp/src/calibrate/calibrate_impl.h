// What the variants of search_scales and feedback_codes share: plain arguments and entry points.
#pragma once

#include <stdint.h>

#include "halfbyte/codebook.h"
#include "halfbyte/dtype.h"

namespace halfbyte {

// A code book as kernels want it.
struct CodeTable {
  float levels[16];
  float thresholds[15];
  uint8_t code_of_rank[16];
};

// Candidates of a block's scale, as shares of its absmax, for each sign; then refinements.
constexpr int kCandidates = 21;
constexpr float kFirstCandidate = 0.5f;
constexpr float kCandidateStep = 0.03125f;
constexpr int kRefinements = 8;

constexpr int kSumLanes = 16;          // lanes of the sums over a block
constexpr int kFeedbackPanel = 8;      // columns whose sums are taken together
constexpr int64_t kFeedbackRows = 16;  // rows of a tile

struct SearchScalesArgs {
  const void* weight;  // [count]
  DType dtype;
  const float* moments;  // [columns]
  int64_t count, columns;
  int64_t block_size;
  CodeTable table;
  float* scales;  // [blocks]
};

struct FeedbackCodesArgs {
  const float* weight;        // [rows, columns]
  const float* scales;        // [blocks]
  const float* coefficients;  // [columns, columns]
  const int64_t* order;       // [columns]
  int64_t rows, columns;
  int block_shift;
  bool triangular;
  CodeTable table;
  float* errors;   // [rows, columns]
  uint8_t* codes;  // [rows, columns]
};

// Scales of blocks [begin, end). `scratch` holds two blocks, each padded to whole kSumLanes.
using SearchBlocks = void (*)(const SearchScalesArgs& args, int64_t begin, int64_t end,
                              float* scratch);
// Codes and errors of the rows from `begin`, at most kFeedbackRows. `scratch` holds
// kFeedbackRows * columns floats.
using FeedbackTile = void (*)(const FeedbackCodesArgs& args, int64_t begin, float* scratch);

void search_blocks_reference(const SearchScalesArgs&, int64_t begin, int64_t end, float* scratch);
void search_blocks_portable(const SearchScalesArgs&, int64_t begin, int64_t end, float* scratch);
void search_blocks_avx2(const SearchScalesArgs&, int64_t begin, int64_t end, float* scratch);
void search_blocks_avx512(const SearchScalesArgs&, int64_t begin, int64_t end, float* scratch);

void feedback_tile_reference(const FeedbackCodesArgs&, int64_t begin, float* scratch);
void feedback_tile_portable(const FeedbackCodesArgs&, int64_t begin, float* scratch);
void feedback_tile_avx2(const FeedbackCodesArgs&, int64_t begin, float* scratch);
void feedback_tile_avx512(const FeedbackCodesArgs&, int64_t begin, float* scratch);

}  // namespace halfbyte
