// The instruction sets that the CPU kernels are compiled for, and which of them this machine runs. Torch-free.
#pragma once

#include <array>
#include <cstdlib>
#include <cstring>

namespace fastalign {

// Index into fastalign_kernels.native.TARGETS. ATEN_CPU_CAPABILITY, which limits torch's kernels to "avx2" or "default", limits these too.
inline int chosen_target() {
#ifdef FASTALIGN_X86_TARGETS
  static const int chosen = [] {
    __builtin_cpu_init();
    const char* const limit = std::getenv("ATEN_CPU_CAPABILITY");
    if (limit != nullptr && std::strcmp(limit, "default") == 0) return 0;
    const bool wide = limit == nullptr || std::strcmp(limit, "avx2") != 0;
    if (wide && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
  }();
  return chosen;
#else
  return 0;
#endif
}

// Whether gemm/ multiplies matrices unless FASTALIGN_GEMM says otherwise: on AMD with AVX-512, because torch's library has only AVX2 code there.
inline bool prefers_native_gemm() {
#ifdef FASTALIGN_X86_TARGETS
  static const bool preferred = __builtin_cpu_is("amd") && chosen_target() == 2;
  return preferred;
#else
  return false;
#endif
}

}  // namespace fastalign

// The table `name` of kernels of the chosen target.
#ifdef FASTALIGN_X86_TARGETS
#define FASTALIGN_DECLARE_KERNELS(type, name)      \
  namespace generic { extern const type name; }    \
  namespace avx2 { extern const type name; }       \
  namespace avx512 { extern const type name; }
#define FASTALIGN_KERNELS(name) (*std::array{&generic::name, &avx2::name, &avx512::name}[chosen_target()])
#else
#define FASTALIGN_DECLARE_KERNELS(type, name) \
  namespace generic { extern const type name; }
#define FASTALIGN_KERNELS(name) (generic::name)
#endif
