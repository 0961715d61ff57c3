// Lets g++, clang++ and nvcc (host and device) share code: a mark of functions, and a cast of bits. Torch-free.
#pragma once

#include <cstdint>
#include <cstring>

// Marked functions are static and forced inline: a linker must never keep a weak copy that was compiled for other instructions.
#ifdef __CUDACC__
#define FA_HD_MEMBER __host__ __device__ __forceinline__
#define FA_HD static FA_HD_MEMBER
#else
#define FA_HD_MEMBER inline __attribute__((always_inline))
#define FA_HD static FA_HD_MEMBER
#endif

namespace fastalign {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

namespace FASTALIGN_TARGET {

template <class To, class From> FA_HD To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
