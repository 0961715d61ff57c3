// Element types, and their conversion to and from the vectors that the kernels compute in. Torch-free. Conversions use integer arithmetic
// only, so one source vectorises on every target without F16C, AVX512-BF16 or NEON intrinsics.
#pragma once

#include "portable.h"

namespace fastalign {

enum Dtype { F32, F64, BF16, F16, DTYPES };

template <class T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <class T> using Accumulator = typename AccumulatorOf<T>::type;

namespace FASTALIGN_TARGET {

// Bytes of a register of the target. GCC 12 splits wider vectors for arithmetic, but compares them and selects among them lane by lane: in
// AVX2 one a < b of 64 bytes is 119 instructions, and cross_entropy of [64, 32000] in fp32 took 18 ms where PyTorch takes 5.7.
#if defined(__AVX512F__)
constexpr int REGISTER = 64;
#elif defined(__AVX__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
typedef float f32v __attribute__((vector_size(REGISTER)));
typedef double f64v __attribute__((vector_size(REGISTER)));
typedef uint32_t u32v __attribute__((vector_size(REGISTER)));
typedef uint16_t u16v __attribute__((vector_size(REGISTER / 2)));

FA_HD f32v load_lanes(const float* p) { f32v v; std::memcpy(&v, p, sizeof v); return v; }
FA_HD f64v load_lanes(const double* p) { f64v v; std::memcpy(&v, p, sizeof v); return v; }
FA_HD void store_lanes(float* p, f32v v) { std::memcpy(p, &v, sizeof v); }
FA_HD void store_lanes(double* p, f64v v) { std::memcpy(p, &v, sizeof v); }

FA_HD u32v load_bits(const void* p) {
  u16v half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, u32v);
}
FA_HD void store_bits(void* p, u32v bits) {
  const u16v half = __builtin_convertvector(bits, u16v);
  std::memcpy(p, &half, sizeof half);
}

FA_HD f32v load_lanes(const bf16* p) { return bit_cast<f32v>(load_bits(p) << 16); }

// Round to nearest, ties to even; NaN becomes the quiet NaN 0x7fc0.
FA_HD void store_lanes(bf16* p, f32v v) {
  const u32v bits = bit_cast<u32v>(v);
  const u32v rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_bits(p, (bits & 0x7fffffff) > 0x7f800000 ? u32v{} + 0x7fc0 : rounded);
}

// fp16 exponent and mantissa moved to their fp32 places, then rescaled by 2^112, which also normalises subnormals.
FA_HD f32v load_lanes(const fp16* p) {
  const u32v half = load_bits(p);
  const u32v moved = (half & 0x7fff) << 13;
  const u32v finite = bit_cast<u32v>(bit_cast<f32v>(moved) * 0x1p112f);
  return bit_cast<f32v>((moved >= 0x0f800000 ? moved | 0x7f800000 : finite) | (half & 0x8000) << 16);
}

// Round to nearest, ties to even; overflow becomes infinity, NaN the quiet NaN 0x7e00.
FA_HD void store_lanes(fp16* p, f32v v) {
  const u32v bits = bit_cast<u32v>(v), magnitude = bits & 0x7fffffff;
  const u32v normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const u32v subnormal = bit_cast<u32v>(bit_cast<f32v>(magnitude) + 0.5f) - 0x3f000000;  // fp32 addition does the rounding
  const u32v special = magnitude > 0x7f800000 ? u32v{} + 0x7e00 : u32v{} + 0x7c00;
  const u32v finite = magnitude < 0x38800000 ? subnormal : normal;
  store_bits(p, (magnitude >= 0x47800000 ? special : finite) | (bits >> 16 & 0x8000));
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
