// The two streams beside the caller's on which pages travel, and the events that order them.
//
//   fetch   host -> device         ready[slot] follows it
//   evict   device -> host         gone[slot] follows it
//
// Two streams, so that both directions of the bus are used at once. Slot i of a ring serves page i,
// i + ring, ...; for pinned arenas a slot is a staging buffer on the device as well. All of it is
// made at first use, kept between steps and belongs to the arena's device, which must be current
// for every call.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include <vector>

namespace halfbyte::cuda {

class SideStreams {
 public:
  SideStreams() = default;
  ~SideStreams();
  SideStreams(const SideStreams&) = delete;
  SideStreams& operator=(const SideStreams&) = delete;

  // Streams, and at least `ring` slots. "" or a sentence.
  const char* prepare(int64_t ring);
  // At least `bytes` of device memory in each of the first `ring` slots; grows by waiting for the
  // device.
  const char* reserve_staging(int64_t ring, int64_t bytes);

  cudaStream_t fetch = nullptr, evict = nullptr;
  cudaEvent_t start = nullptr, updated = nullptr;  // on the caller's stream
  struct Slot {
    cudaEvent_t ready = nullptr, gone = nullptr;
    char* staging = nullptr;
  };
  std::vector<Slot> slots;

 private:
  int64_t staging_bytes_ = 0;
};

// "<what>: <bytes> bytes ...; <free> of <total> bytes of device <device> are free"
const char* out_of_memory(cudaError_t error, const char* what, int64_t bytes, int device);

}  // namespace halfbyte::cuda
