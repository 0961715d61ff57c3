// Vectors of 16 fp32 in AVX-512 that csrc/gemm and csrc/int8 share: masked loads, and a transposition. Torch-free.
#pragma once

#include <immintrin.h>

#include "dtypes.h"

namespace fastalign {
namespace avx512 {
namespace {

constexpr int64_t LANES = 16;

inline __mmask16 first(int64_t count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

// 16 elements as fp32, of which `count` exist.
inline __m512 widened(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first(count), p); }
inline __m512 widened(const fp16* p, int64_t count) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p)); }
inline __m512 widened(const bf16* p, int64_t count) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), p)), 16));
}

inline void transpose(__m512 (&r)[LANES]) {
  __m512 s[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i += 2) s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i += 4) {
    const auto low = [&](int a, int b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(s[a]), _mm512_castps_pd(s[b]))); };
    const auto high = [&](int a, int b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(s[a]), _mm512_castps_pd(s[b]))); };
    r[i] = low(i, i + 2), r[i + 1] = high(i, i + 2), r[i + 2] = low(i + 1, i + 3), r[i + 3] = high(i + 1, i + 3);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // r[4 g + i]: of rows 4 g to 4 g + 3, the columns i, 4 + i, 8 + i, 12 + i
    const __m512 a = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd), d = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    s[i] = _mm512_shuffle_f32x4(a, b, 0x88), s[8 + i] = _mm512_shuffle_f32x4(a, b, 0xdd);
    s[4 + i] = _mm512_shuffle_f32x4(c, d, 0x88), s[12 + i] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) r[i] = s[i];
}

}  // namespace
}  // namespace avx512
}  // namespace fastalign
