// What this processor and this build can do.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "halfbyte/tensor_view.h"
#include "halfbyte/variant.h"

namespace halfbyte {

std::vector<std::pair<std::string, bool>> cpu_feature_list();
// Asks the operating system to back large fresh memory with huge pages: a dense weight of 32 MB
// then takes 16 page faults instead of 8,192. Only a hint.
void advise_huge_pages(const TensorView& memory);
// "" when CUDA kernels can run, otherwise a sentence.
std::string cuda_why_not();
// One line a device: name, compute capability, memory. Empty when CUDA kernels cannot run.
std::vector<std::string> cuda_devices();
// The CUDA library's table of `op` ("quantize_4bit", "dequantize_4bit", "lora_linear", "adamw8")
// for a typical launch on `device`; empty without the library.
std::vector<VariantStatus> cuda_variants(const std::string& op, int device);

}  // namespace halfbyte
