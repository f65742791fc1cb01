// A step of 8-bit AdamW whose state lies in arenas (arena.h), page after page.
#pragma once

#include "halfbyte/cuda/api.h"

namespace halfbyte::cuda {

const char* adamw8_paged_step(const PagedAdamW8Launch& launch, Where where);

}  // namespace halfbyte::cuda
