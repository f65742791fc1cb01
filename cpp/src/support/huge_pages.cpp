// Transparent huge pages, where the system leaves the choice to the program ("madvise").
#include "halfbyte/device.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace halfbyte {

void advise_huge_pages(const TensorView& memory) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(memory.data);
  const uintptr_t end = begin + static_cast<uintptr_t>(memory.numel() * dtype_size(memory.dtype));
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = end / kHugePage * kHugePage;
  if (last >= first + kHugePage)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory;
#endif
}

}  // namespace halfbyte
