// search_scales and feedback_codes for any processor; the story is in calibrate_kernels.inc.

#include "calibrate_impl.h"
#include "simd/prelude.h"

namespace halfbyte {
namespace {
#include "simd/portable.inc"
#include "calibrate/calibrate_kernels.inc"
}  // namespace

void search_blocks_portable(const SearchScalesArgs& args, int64_t begin, int64_t end,
                            float* scratch) {
  search_blocks(args, begin, end, scratch);
}

void feedback_tile_portable(const FeedbackCodesArgs& args, int64_t begin, float* scratch) {
  feedback_tile(args, begin, scratch);
}

}  // namespace halfbyte
