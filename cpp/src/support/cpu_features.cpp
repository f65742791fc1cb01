// Probe by cpuid through the compiler's builtins, which also check that the operating system saves
// the wide registers (XGETBV).
#include "cpu_features.h"

#include "halfbyte/device.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace halfbyte {

// The kernel saves the 8 KB of tiles only for processes that have asked for it.
static bool tiles_are_permitted() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

static CpuFeatures probe() {
  CpuFeatures found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  found.avx2_fma_f16c = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  found.avx512 = found.avx2_fma_f16c && __builtin_cpu_supports("avx512f") &&
                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl");
  found.avx512_bf16 = found.avx512 && __builtin_cpu_supports("avx512bf16");
  found.avx512_vbmi = found.avx512 && __builtin_cpu_supports("avx512vbmi");
  found.avx512_vnni = found.avx512 && __builtin_cpu_supports("avx512vnni");
  found.amx_bf16 = found.avx512_bf16 && __builtin_cpu_supports("amx-tile") &&
                   __builtin_cpu_supports("amx-bf16") && tiles_are_permitted();
#endif
  return found;
}

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = probe();
  return features;
}

std::vector<std::pair<std::string, bool>> cpu_feature_list() {
  const CpuFeatures& f = cpu_features();
  return {{"avx2+fma+f16c", f.avx2_fma_f16c}, {"avx512f+bw+dq+vl", f.avx512},
          {"avx512_bf16", f.avx512_bf16},     {"avx512_vbmi", f.avx512_vbmi},
          {"avx512_vnni", f.avx512_vnni},     {"amx_bf16", f.amx_bf16}};
}

}  // namespace halfbyte
