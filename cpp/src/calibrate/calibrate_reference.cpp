// The reference of search_scales and feedback_codes: one element at a time, no tricks. It never
// gets faster; every other variant is held to its bits.
#include <math.h>

#include "calibrate_impl.h"
#include "support/scalar.h"

namespace halfbyte {
namespace {

int code_of(const CodeTable& table, float x) {
  int rank = 0;
  for (float threshold : table.thresholds) rank += x > threshold;
  return table.code_of_rank[rank];
}

struct Block {
  const SearchScalesArgs& args;
  int64_t first, count;
  float inverse;  // 1 / absmax

  float u(int64_t i) const { return load_element(args.weight, args.dtype, first + i) * inverse; }
  float h(int64_t i) const { return args.moments[(first + i) % args.columns]; }
};

double sum_lanes(const float* lanes) {
  double sum = 0;
  for (int lane = 0; lane < kSumLanes; ++lane) sum += lanes[lane];
  return sum;
}

double damage(const Block& block, float g) {
  float lanes[kSumLanes] = {};
  const float inverse = 1.0f / g;
  for (int64_t i = 0; i < block.count; ++i) {
    const float u = block.u(i);
    const float e = u - block.args.table.levels[code_of(block.args.table, u * inverse)] * g;
    lanes[i % kSumLanes] += block.h(i) * e * e;
  }
  return sum_lanes(lanes);
}

float least_squares(const Block& block, float g) {
  float numerators[kSumLanes] = {}, denominators[kSumLanes] = {};
  const float inverse = 1.0f / g;
  for (int64_t i = 0; i < block.count; ++i) {
    const float u = block.u(i);
    const float level = block.args.table.levels[code_of(block.args.table, u * inverse)];
    const float weighted = block.h(i) * level;
    numerators[i % kSumLanes] += weighted * u;
    denominators[i % kSumLanes] += weighted * level;
  }
  return static_cast<float>(sum_lanes(numerators) / sum_lanes(denominators));
}

float search_block(const Block& block) {
  const double plain = damage(block, 1.0f);
  double best = plain;
  float best_g = 1.0f;
  const float signs[] = {1.0f, -1.0f};
  for (float sign : signs) {
    float g = sign;
    double least = sign > 0 ? plain : damage(block, g);
    for (int n = 0; n < kCandidates; ++n) {
      const float candidate = sign * (kFirstCandidate + static_cast<float>(n) * kCandidateStep);
      const double sum = damage(block, candidate);
      if (sum < least) {
        least = sum;
        g = candidate;
      }
    }
    for (int n = 0; n < kRefinements; ++n) {
      const float refined = least_squares(block, g);
      if (!(fabsf(refined) >= kFirstCandidate / 2 && fabsf(refined) <= 2.0f)) break;
      const double sum = damage(block, refined);
      if (!(sum < least)) break;
      least = sum;
      g = refined;
    }
    if (least < best) {
      best = least;
      best_g = g;
    }
  }
  return best_g;
}

}  // namespace

void search_blocks_reference(const SearchScalesArgs& args, int64_t begin, int64_t end, float*) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * args.block_size;
    const int64_t left = args.count - first;
    const int64_t count = left < args.block_size ? left : args.block_size;
    float absmax = 0;
    for (int64_t i = first; i < first + count; ++i) {
      const float magnitude = fabsf(load_element(args.weight, args.dtype, i));
      absmax = magnitude > absmax ? magnitude : absmax;
    }
    const float inverse = 1.0f / absmax;
    const bool searched = inverse <= 3.402823466e38f;  // not zero and not subnormal
    args.scales[block] = searched ? absmax * search_block({args, first, count, inverse}) : absmax;
  }
}

void feedback_tile_reference(const FeedbackCodesArgs& args, int64_t begin, float*) {
  const int64_t end = begin + kFeedbackRows < args.rows ? begin + kFeedbackRows : args.rows;
  const int64_t K = args.columns, whole = K / kFeedbackPanel * kFeedbackPanel;
  for (int64_t row = begin; row < end; ++row) {
    float* d = args.errors + row * K;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t column = args.order[k], flat = row * K + column;
      const int64_t first = k < whole ? k / kFeedbackPanel * kFeedbackPanel : k;
      const int64_t last = k < whole ? first + kFeedbackPanel : k + 1;
      float t = args.weight[flat];
      const auto spread = [&](int64_t from, int64_t to) {
        for (int64_t j = from; j < to; ++j)
          if (j != k) t += d[args.order[j]] * args.coefficients[k * K + j];
      };
      spread(0, first);
      if (!args.triangular) spread(last, K);
      spread(first, args.triangular ? k : last);

      const float scale = args.scales[flat >> args.block_shift];
      const float inverse = 1.0f / scale;
      const int code = code_of(args.table, fabsf(inverse) <= 3.402823466e38f ? t * inverse : 0.0f);
      d[column] = args.weight[flat] - args.table.levels[code] * scale;
      args.codes[flat] = static_cast<uint8_t>(code);
    }
  }
}

}  // namespace halfbyte
