// Whether CUDA kernels are there, and if not, why.
#pragma once

namespace halfbyte::cuda {

// "" when CUDA kernels can run, otherwise a sentence.
const char* why_not();

}  // namespace halfbyte::cuda
