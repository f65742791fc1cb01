// Pageable optimizer state on CUDA: memory that the host can read and write, and an AdamW step that
// brings it to the device page by page.
//
//   managed   pages of memory move between device and host, addresses stay
//   pinned    page-locked host memory, copied through a staging buffer around each update
//
// On the CPU the operating system pages: a mapped file does (python/halfbyte/paging.py), and a step
// is the ordinary one.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "halfbyte/adamw8.h"

namespace halfbyte {

namespace cuda {
struct Arena;
}

// One allocation for one CUDA device. Its owner hands out spans and keeps it alive while they are
// used; the destructor waits for the device's use of it. Errors, out of memory among them, are
// `Error`s that name the bytes and the device.
class Arena {
 public:
  // kind: "managed", "pinned", or "auto": managed where the device can fault pages in.
  Arena(int64_t bytes, int device, const std::string& kind);

  void* data() const;
  int64_t bytes() const { return bytes_; }
  int device() const { return device_; }
  std::string kind() const;  // "managed" or "pinned"
  cuda::Arena* handle() const { return handle_.get(); }

 private:
  struct Destroy {
    void operator()(cuda::Arena* arena) const;
  };
  int64_t bytes_;
  int device_;
  std::unique_ptr<cuda::Arena, Destroy> handle_;
};

// Consecutive tensors of a step whose state lies in [begin, end) of `arena`; null: it lies in plain
// device memory.
struct Page {
  const Arena* arena = nullptr;
  int64_t begin = 0, end = 0;  // bytes
  int64_t first_tensor = 0, tensor_count = 0;
};

struct PagedAdamW8Params {
  AdamW8Params step;        // on a CUDA device
  std::vector<Page> pages;  // cover all tensors, in order
  int64_t look_ahead = 2;   // pages that travel to the device before the one that is updated
  bool evict = false;       // send a page back to the host after its update
};
// `adamw8_step` on CUDA, the same bits; nothing waits on the host.
void adamw8_paged_step(const PagedAdamW8Params& params);

}  // namespace halfbyte
