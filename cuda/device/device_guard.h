// Makes a device current for a scope and gives the caller's back afterwards.
#pragma once

#include "device/error.h"

namespace halfbyte::cuda {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    problem_ = failed(cudaGetDevice(&previous_), "cudaGetDevice");
    if (!problem_ && previous_ != device_)
      problem_ = failed(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (!problem_ && previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  const char* problem() const { return problem_; }  // null, or a sentence

 private:
  int device_;
  int previous_ = 0;
  const char* problem_ = nullptr;
};

}  // namespace halfbyte::cuda
