// Making and freeing of the streams, events and staging buffers described in side_streams.h.
#include "memory/side_streams.h"

#include "device/error.h"

namespace halfbyte::cuda {
namespace {

const char* make_stream(cudaStream_t* stream) {
  if (*stream) return nullptr;
  return failed(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "cudaStreamCreate");
}

const char* make_event(cudaEvent_t* event) {
  if (*event) return nullptr;
  return failed(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "cudaEventCreate");
}

}  // namespace

SideStreams::~SideStreams() {
  for (const Slot& slot : slots) {
    if (slot.ready) cudaEventDestroy(slot.ready);
    if (slot.gone) cudaEventDestroy(slot.gone);
    if (slot.staging) cudaFree(slot.staging);
  }
  if (start) cudaEventDestroy(start);
  if (updated) cudaEventDestroy(updated);
  if (fetch) cudaStreamDestroy(fetch);
  if (evict) cudaStreamDestroy(evict);
}

const char* SideStreams::prepare(int64_t ring) {
  const char* problem = make_stream(&fetch);
  if (!problem) problem = make_stream(&evict);
  if (!problem) problem = make_event(&start);
  if (!problem) problem = make_event(&updated);
  if (static_cast<int64_t>(slots.size()) < ring) slots.resize(static_cast<size_t>(ring));
  for (Slot& slot : slots) {
    if (!problem) problem = make_event(&slot.ready);
    if (!problem) problem = make_event(&slot.gone);
  }
  return problem ? problem : kOk;
}

const char* SideStreams::reserve_staging(int64_t ring, int64_t bytes) {
  bool enough = bytes <= staging_bytes_;
  for (int64_t i = 0; i < ring; ++i) enough = enough && slots[static_cast<size_t>(i)].staging;
  if (enough) return kOk;
  if (const char* problem = failed(cudaDeviceSynchronize(), "staging")) return problem;
  const int64_t wanted = bytes > staging_bytes_ ? bytes : staging_bytes_;
  staging_bytes_ = 0;
  for (Slot& slot : slots) {
    if (slot.staging) cudaFree(slot.staging);
    slot.staging = nullptr;
  }
  int device = 0;
  cudaGetDevice(&device);
  for (int64_t i = 0; i < ring; ++i) {
    void* memory = nullptr;
    const cudaError_t error = cudaMalloc(&memory, static_cast<size_t>(wanted));
    if (error != cudaSuccess)
      return out_of_memory(error, "staging buffer of the paged optimizer", wanted, device);
    slots[static_cast<size_t>(i)].staging = static_cast<char*>(memory);
  }
  staging_bytes_ = wanted;
  return kOk;
}

const char* out_of_memory(cudaError_t error, const char* what, int64_t bytes, int device) {
  cudaGetLastError();
  size_t free_bytes = 0, total_bytes = 0;
  const bool known = cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess;
  cudaGetLastError();
  const char* reason =
      error == cudaErrorMemoryAllocation ? "out of memory" : cudaGetErrorString(error);
  if (!known)
    return say("%s: %lld bytes on device %d: %s", what, static_cast<long long>(bytes), device,
               reason);
  return say("%s: %lld bytes on device %d: %s; %lld of its %lld bytes are free", what,
             static_cast<long long>(bytes), device, reason, static_cast<long long>(free_bytes),
             static_cast<long long>(total_bytes));
}

}  // namespace halfbyte::cuda
