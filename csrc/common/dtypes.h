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

typedef float f32x16 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

FA_HD f32x16 load_lanes(const float* p) { f32x16 v; std::memcpy(&v, p, sizeof v); return v; }
FA_HD f64x8 load_lanes(const double* p) { f64x8 v; std::memcpy(&v, p, sizeof v); return v; }
FA_HD void store_lanes(float* p, f32x16 v) { std::memcpy(p, &v, sizeof v); }
FA_HD void store_lanes(double* p, f64x8 v) { std::memcpy(p, &v, sizeof v); }

FA_HD u32x16 load_bits(const void* p) {
  u16x16 half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, u32x16);
}
FA_HD void store_bits(void* p, u32x16 bits) {
  const u16x16 half = __builtin_convertvector(bits, u16x16);
  std::memcpy(p, &half, sizeof half);
}

FA_HD f32x16 load_lanes(const bf16* p) { return bit_cast<f32x16>(load_bits(p) << 16); }

// Round to nearest, ties to even; NaN becomes the quiet NaN 0x7fc0.
FA_HD void store_lanes(bf16* p, f32x16 v) {
  const u32x16 bits = bit_cast<u32x16>(v);
  const u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_bits(p, (bits & 0x7fffffff) > 0x7f800000 ? u32x16{} + 0x7fc0 : rounded);
}

// fp16 exponent and mantissa moved to their fp32 places, then rescaled by 2^112, which also normalises subnormals.
FA_HD f32x16 load_lanes(const fp16* p) {
  const u32x16 half = load_bits(p);
  const u32x16 moved = (half & 0x7fff) << 13;
  const u32x16 finite = bit_cast<u32x16>(bit_cast<f32x16>(moved) * 0x1p112f);
  return bit_cast<f32x16>((moved >= 0x0f800000 ? moved | 0x7f800000 : finite) | (half & 0x8000) << 16);
}

// Round to nearest, ties to even; overflow becomes infinity, NaN the quiet NaN 0x7e00.
FA_HD void store_lanes(fp16* p, f32x16 v) {
  const u32x16 bits = bit_cast<u32x16>(v), magnitude = bits & 0x7fffffff;
  const u32x16 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const u32x16 subnormal = bit_cast<u32x16>(bit_cast<f32x16>(magnitude) + 0.5f) - 0x3f000000;  // fp32 addition does the rounding
  const u32x16 special = magnitude > 0x7f800000 ? u32x16{} + 0x7e00 : u32x16{} + 0x7c00;
  const u32x16 finite = magnitude < 0x38800000 ? subnormal : normal;
  store_bits(p, (magnitude >= 0x47800000 ? special : finite) | (bits >> 16 & 0x8000));
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
