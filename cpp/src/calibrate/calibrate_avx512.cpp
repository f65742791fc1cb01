// search_scales and feedback_codes for AVX-512; the story is in calibrate_kernels.inc.
#include <immintrin.h>

#include "calibrate_impl.h"
#include "simd/prelude.h"

namespace halfbyte {
namespace {
#include "simd/avx512.inc"
#include "calibrate/calibrate_kernels.inc"
}  // namespace

void search_blocks_avx512(const SearchScalesArgs& args, int64_t begin, int64_t end,
                          float* scratch) {
  search_blocks(args, begin, end, scratch);
}

void feedback_tile_avx512(const FeedbackCodesArgs& args, int64_t begin, float* scratch) {
  feedback_tile(args, begin, scratch);
}

}  // namespace halfbyte
