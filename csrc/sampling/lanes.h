// Vectors of 16 floats, with the functions that arithmetic.h defines for one float. Included there; torch-free; for g++ and clang++ only.
//
// 16 on all targets, because the order of sums is part of the sampler's definition. Where registers are narrower, comparisons and selections
// go piece by piece: dtypes.h has the reason.
#pragma once

#include <type_traits>

#include "../common/dtypes.h"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace fastalign {
namespace FASTALIGN_TARGET {

typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
constexpr int L = 16;  // lanes

template <class V, int BYTES> struct VectorOf {
  typedef std::decay_t<decltype(V{}[0])> type __attribute__((vector_size(BYTES)));
};
template <class V> struct Halves { typename VectorOf<V, sizeof(V) / 2>::type low, high; };
template <class V> FA_HD auto joined(V low, V high) {
  using Whole = typename VectorOf<V, 2 * sizeof(V)>::type;
  return bit_cast<Whole>(Halves<Whole>{low, high});
}

// f of vectors, in pieces of a register's size.
#define FA_PIECE __attribute__((always_inline))
template <class F, class V, class... Vs> FA_HD auto piecewise(F f, V first, Vs... rest) {
  if constexpr (sizeof(V) <= REGISTER) {
    return f(first, rest...);
  } else {
    return joined(piecewise(f, bit_cast<Halves<V>>(first).low, bit_cast<Halves<Vs>>(rest).low...),
                  piecewise(f, bit_cast<Halves<V>>(first).high, bit_cast<Halves<Vs>>(rest).high...));
  }
}

// 16 elements as fp32.
template <int COUNT = L, class T> FA_HD auto load16(const T* p) {
  if constexpr (COUNT * sizeof(float) <= REGISTER)
    return load_lanes(p);
  else
    return joined(load16<COUNT / 2>(p), load16<COUNT / 2>(p + COUNT / 2));
}

FA_HD f32x16 splat(float x, f32x16) { return x - f32x16{}; }
FA_HD f32x16 chosen(i32x16 yes, f32x16 a, f32x16 b) {
  return piecewise([](auto yes, auto a, auto b) FA_PIECE { return yes ? a : b; }, yes, a, b);
}
FA_HD i32x16 exceeds(f32x16 a, f32x16 b) {
  return piecewise([](auto a, auto b) FA_PIECE { return a > b; }, a, b);
}
FA_HD f32x16 power_of_two(f32x16 shifted) { return bit_cast<f32x16>((bit_cast<u32x16>(shifted) << 23) + 0x3f800000u); }
#ifdef __AVX512F__  // three instructions of exp2 less: on Zen 5 a tempered row without filters takes 0.93 of the time
FA_HD f32x16 nearest(f32x16 x, f32x16) { return (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FA_HD f32x16 scaled(f32x16 p, f32x16 n, f32x16) { return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)n); }
#else
FA_HD f32x16 nearest(f32x16, f32x16 shifted) { return shifted - 12582912.0f; }
FA_HD f32x16 scaled(f32x16 p, f32x16, f32x16 shifted) { return p * power_of_two(shifted); }
#endif
FA_HD f32x16 fused(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return (f32x16)__builtin_ia32_vfmaddps512_mask(a, b, c, uint16_t(-1), 4);
#elif defined(__FMA__)
  return piecewise([](auto a, auto b, auto c) FA_PIECE { return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }, a, b, c);
#elif defined(__ARM_NEON)
  return piecewise([](auto a, auto b, auto c) FA_PIECE { return (f32v)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }, a, b, c);
#else
  for (int i = 0; i < L; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

FA_HD u32x16 splat(uint32_t x, u32x16) { return u32x16{} + x; }
FA_HD u32x16 bits_of(f32x16 x) { return bit_cast<u32x16>(x); }
FA_HD f32x16 floats_of(u32x16 x) { return bit_cast<f32x16>(x); }
FA_HD f32x16 converted(u32x16 x) { return __builtin_convertvector(bit_cast<i32x16>(x), f32x16); }
FA_HD void multiply(u32x16 a, uint32_t factor, u32x16& high, u32x16& low) {
#ifdef __AVX512F__
  const __m512i k = _mm512_set1_epi32(int(factor)), even = _mm512_mul_epu32((__m512i)a, k), odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), k);
  low = a * factor;
  high = (u32x16)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#else
  low = a * factor;
  for (int i = 0; i < L; ++i) high[i] = uint32_t(uint64_t(a[i]) * factor >> 32);
#endif
}
FA_HD f32x16 fraction(u32x16 high, u32x16 low) {
  typedef uint64_t u64x8 __attribute__((vector_size(64)));
  typedef uint32_t u32x8 __attribute__((vector_size(32)));
  typedef float f32x8 __attribute__((vector_size(32)));
  struct Words { u32x8 a, b; };
  struct Floats { f32x8 a, b; };
  const auto h = bit_cast<Words>(high), l = bit_cast<Words>(low | 1u);
  const u64x8 a = __builtin_convertvector(h.a, u64x8) << 32 | __builtin_convertvector(l.a, u64x8);
  const u64x8 b = __builtin_convertvector(h.b, u64x8) << 32 | __builtin_convertvector(l.b, u64x8);
  return bit_cast<f32x16>(Floats{__builtin_convertvector(a, f32x8), __builtin_convertvector(b, f32x8)}) * 0x1p-64f;
}

FA_HD f32x16 larger(f32x16 a, f32x16 b) {  // ignores NaN in b
  return piecewise([](auto a, auto b) FA_PIECE { return b > a ? b : a; }, a, b);
}

// Reduces the lanes 16, 8, 4, 2, 1 by f(low half, high half). Lane by lane it would take longer than the arithmetic of a chunk.
template <class F> FA_HD float halved(f32x16 v, F f) {
  typedef float f32x8 __attribute__((vector_size(32)));
  typedef float f32x4 __attribute__((vector_size(16)));
  struct Two8 { f32x8 a, b; };
  struct Two4 { f32x4 a, b; };
  const auto s8 = bit_cast<Two8>(v);
  const auto s4 = bit_cast<Two4>(f(s8.a, s8.b));
  const f32x4 s2 = f(s4.a, s4.b);
  const f32x4 s1 = f(s2, __builtin_shufflevector(s2, s2, 2, 3, 0, 1));
  return f(s1, __builtin_shufflevector(s1, s1, 1, 0, 3, 2))[0];
}
FA_HD float largest(f32x16 v) {
  return halved(v, [](auto a, auto b) { return b > a ? b : a; });
}

// Writes the selected lanes of v to `out`, which has room for 16, and returns their number.
FA_HD int64_t append(float* out, f32x16 v, i32x16 selected) {
#ifdef __AVX512F__
  const __mmask16 mask = _mm512_test_epi32_mask((__m512i)selected, (__m512i)selected);
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, v));  // not compress to memory: 100 cycles and more on Zen 4
  return __builtin_popcount(mask);
#else
  int64_t n = 0;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    out[n] = v[i];
    n += selected[i] & 1;
  }
  return n;
#endif
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
