// What this processor and this build can do.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "halfbyte/tensor_view.h"

namespace halfbyte {

std::vector<std::pair<std::string, bool>> cpu_feature_list();
// Asks the operating system to back large fresh memory with huge pages: a dense weight of 32 MB
// then takes 16 page faults instead of 8,192. Only a hint.
void advise_huge_pages(const TensorView& memory);
// "" when CUDA kernels can run, otherwise a sentence.
std::string cuda_why_not();

}  // namespace halfbyte
