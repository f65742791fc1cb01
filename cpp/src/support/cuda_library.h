// The CUDA library: found beside this module, opened at first use.
#pragma once

#include <string>

#include "halfbyte/cuda/api.h"
#include "halfbyte/tensor_view.h"

namespace halfbyte {

// Its table. Throws the sentence of `cuda_library_why_not` when it cannot be opened.
const cuda::Api& cuda_api();
// "" when the library could be opened, otherwise a sentence.
std::string cuda_library_why_not();

// Throws unless `sentence` is "".
void check_cuda(const char* op, const char* sentence);

inline cuda::Operand cuda_operand(const TensorView& view) {
  return {view.data, view.dtype};
}
inline cuda::Where cuda_where(const TensorView& view, void* stream) {
  return {view.place.index, stream};
}

}  // namespace halfbyte
