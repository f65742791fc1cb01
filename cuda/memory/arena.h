// One allocation a device for pageable state, handed out in spans by the caller.
//
//   managed   cudaMallocManaged: pages move between device and host, addresses stay. Preferred on
//             the device and mapped there, so that what is not resident is read over the bus, never
//             faulted in; prefetches move it.
//   pinned    page-locked host memory, copied around each update (paged_adamw8.cu)
//
// Invariants: an arena is used on its own device; everything that hangs on it (side streams,
// events, staging) is freed with it, after the device's use has ended.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "halfbyte/cuda/api.h"
#include "memory/side_streams.h"

namespace halfbyte::cuda {

struct Arena {
  char* base = nullptr;
  int64_t bytes = 0;
  int device = 0;
  ArenaKind kind = ArenaKind::kManaged;  // never kAuto
  std::unique_ptr<SideStreams> side_streams;

  bool holds(const void* address) const {
    const char* at = static_cast<const char*>(address);
    return at >= base && at < base + bytes;
  }
};

const char* arena_create(int64_t bytes, int device, ArenaKind kind, Arena** out);
void arena_destroy(Arena* arena);
// Nothing to do for pinned memory.
const char* arena_prefetch(Arena* arena, int64_t begin, int64_t end, bool to_device, Where where);

// Null, or why [begin, end) of `arena` cannot be used on `device`.
const char* range_problem(const Arena& arena, int64_t begin, int64_t end, int device);

}  // namespace halfbyte::cuda
