// The honest stub: this build has no CUDA kernels.
#include "halfbyte/cuda/status.h"

namespace halfbyte::cuda {

const char* why_not() {
  return "this version of halfbyte has no CUDA kernels; tensors must be on the CPU";
}

}  // namespace halfbyte::cuda
