// What the processor (and the operating system) lets us execute. Probed once, without ISA flags.
#pragma once

#include <string>

namespace halfbyte {

struct CpuFeatures {
  bool avx2_fma_f16c = false;
  bool avx512 = false;       // F + BW + DQ + VL
  bool avx512_bf16 = false;  // on top of avx512
  bool avx512_vbmi = false;
  bool avx512_vnni = false;
  bool amx_bf16 = false;  // on top of avx512_bf16, and the kernel lets this process use tiles
};

const CpuFeatures& cpu_features();

// `why_not` of variant tables, for any params: what an instruction set needs, or "".
template <class Params>
std::string always(const Params&) {
  return "";
}
template <class Params>
std::string needs_avx2(const Params&) {
  return cpu_features().avx2_fma_f16c ? "" : "needs AVX2, FMA and F16C";
}
template <class Params>
std::string needs_avx512(const Params&) {
  return cpu_features().avx512 ? "" : "needs AVX-512 F, BW, DQ and VL";
}

}  // namespace halfbyte
