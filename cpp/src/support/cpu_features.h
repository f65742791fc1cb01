// What the processor (and the operating system) lets us execute. Probed once, without ISA flags.
#pragma once

namespace halfbyte {

struct CpuFeatures {
  bool avx2_fma_f16c = false;
  bool avx512 = false;       // F + BW + DQ + VL
  bool avx512_bf16 = false;  // on top of avx512
  bool avx512_vbmi = false;
  bool avx512_vnni = false;
};

const CpuFeatures& cpu_features();

}  // namespace halfbyte
