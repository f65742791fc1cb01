// A CUDA error as a sentence. Functions of the library return "" or a sentence that stays valid
// until the calling thread's next one; nothing throws, prints or ends the process.
#pragma once

#include <cuda_runtime_api.h>
#include <stdarg.h>
#include <stdio.h>

namespace halfbyte::cuda {

constexpr const char* kOk = "";

// The formatted sentence, in a buffer of the calling thread.
__attribute__((format(printf, 1, 2))) inline const char* say(const char* format, ...) {
  static thread_local char sentence[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(sentence, sizeof(sentence), format, arguments);
  va_end(arguments);
  return sentence;
}

// Null when `error` is success, otherwise the sentence "<what>: ..."; forgets the error.
inline const char* failed(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return say("%s: %s (%s, CUDA error %d)", what, cudaGetErrorString(error), cudaGetErrorName(error),
             static_cast<int>(error));
}

// Whether the launch just made was accepted, as a sentence; "" when it was.
inline const char* launched(const char* kernel) {
  const char* problem = failed(cudaGetLastError(), kernel);
  return problem ? problem : kOk;
}

}  // namespace halfbyte::cuda
