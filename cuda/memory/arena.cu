// Allocation, advice, prefetch and release of an arena. The device is current (api.cu sees to it).
#include "memory/arena.h"

#include "device/device_guard.h"
#include "device/error.h"

namespace halfbyte::cuda {
namespace {

cudaMemLocation on_device(int device) {
  cudaMemLocation location{};
  location.type = cudaMemLocationTypeDevice;
  location.id = device;
  return location;
}

cudaMemLocation on_host() {
  cudaMemLocation location{};
  location.type = cudaMemLocationTypeHost;
  return location;
}

bool has_concurrent_access(int device) {
  int concurrent = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&concurrent, cudaDevAttrConcurrentManagedAccess, device);
  return !failed(error, "cudaDeviceGetAttribute") && concurrent != 0;
}

cudaError_t allocate_managed(Arena& arena) {
  void* memory = nullptr;
  const auto bytes = static_cast<size_t>(arena.bytes);
  cudaError_t error = cudaMallocManaged(&memory, bytes, cudaMemAttachGlobal);
  if (error != cudaSuccess) return error;
  const cudaMemLocation device = on_device(arena.device);
  error = cudaMemAdvise(memory, bytes, cudaMemAdviseSetPreferredLocation, device);
  if (error == cudaSuccess)
    error = cudaMemAdvise(memory, bytes, cudaMemAdviseSetAccessedBy, device);
  if (error != cudaSuccess) {
    cudaFree(memory);
    return error;
  }
  arena.base = static_cast<char*>(memory);
  arena.kind = ArenaKind::kManaged;
  return cudaSuccess;
}

cudaError_t allocate_pinned(Arena& arena) {
  void* memory = nullptr;
  const cudaError_t error =
      cudaHostAlloc(&memory, static_cast<size_t>(arena.bytes), cudaHostAllocPortable);
  if (error != cudaSuccess) return error;
  arena.base = static_cast<char*>(memory);
  arena.kind = ArenaKind::kPinned;
  return cudaSuccess;
}

}  // namespace

const char* arena_create(int64_t bytes, int device, ArenaKind kind, Arena** out) {
  *out = nullptr;
  if (bytes <= 0) return say("arena: expected bytes > 0, got %lld", static_cast<long long>(bytes));
  auto arena = std::make_unique<Arena>();
  arena->bytes = bytes;
  arena->device = device;

  const bool concurrent = kind != ArenaKind::kPinned && has_concurrent_access(device);
  if (kind == ArenaKind::kManaged && !concurrent)
    return say(
        "arena: device %d does not let host and device use managed memory at the same time; "
        "ask for pinned memory",
        device);
  cudaError_t error = concurrent ? allocate_managed(*arena) : cudaSuccess;
  if (kind == ArenaKind::kManaged && error != cudaSuccess)
    return out_of_memory(error, "arena of managed memory", bytes, device);
  if (!arena->base) {
    cudaGetLastError();  // managed memory refused: pinned memory takes its place
    error = allocate_pinned(*arena);
    if (error != cudaSuccess)
      return out_of_memory(error, "arena of pinned host memory", bytes, device);
  }
  *out = arena.release();
  return kOk;
}

void arena_destroy(Arena* arena) {
  if (!arena) return;
  const std::unique_ptr<Arena> owned(arena);
  const DeviceGuard guard(arena->device);
  cudaDeviceSynchronize();
  arena->side_streams.reset();
  if (arena->kind == ArenaKind::kManaged) {
    cudaFree(arena->base);
  } else {
    cudaFreeHost(arena->base);
  }
  cudaGetLastError();  // the driver may be gone at the end of the process
}

const char* range_problem(const Arena& arena, int64_t begin, int64_t end, int device) {
  if (begin < 0 || begin > end || end > arena.bytes)
    return say("range: expected 0 <= begin <= end <= %lld, got [%lld, %lld)",
               static_cast<long long>(arena.bytes), static_cast<long long>(begin),
               static_cast<long long>(end));
  if (arena.device != device)
    return say("arena: lies on device %d, used on device %d", arena.device, device);
  return nullptr;
}

const char* arena_prefetch(Arena* arena, int64_t begin, int64_t end, bool to_device, Where where) {
  if (const char* problem = range_problem(*arena, begin, end, where.device)) return problem;
  if (arena->kind == ArenaKind::kPinned || begin == end) return kOk;
  const cudaError_t error = cudaMemPrefetchAsync(
      arena->base + begin, static_cast<size_t>(end - begin),
      to_device ? on_device(arena->device) : on_host(), 0, static_cast<cudaStream_t>(where.stream));
  const char* problem = failed(error, "cudaMemPrefetchAsync");
  return problem ? problem : kOk;
}

}  // namespace halfbyte::cuda
