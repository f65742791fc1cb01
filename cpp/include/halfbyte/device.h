// What this processor and this build can do.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace halfbyte {

std::vector<std::pair<std::string, bool>> cpu_feature_list();
// "" when CUDA kernels can run, otherwise a sentence.
std::string cuda_why_not();

}  // namespace halfbyte
