// Matrix products with fp32 sums in AVX-512. setup.py compiles this file with the flags of AVX-512 and AVX512-BF16; launch.cpp asks for pairs of
// bf16 only on machines that have the latter.
#include "api.h"

#include <algorithm>

#include "../common/vectors512.h"

namespace fastalign {
namespace avx512 {
namespace {

// 16 elements as bf16 in the lower halves of 32 bits.
inline __m512i narrowed(const bf16* p, int64_t count) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), p)); }
template <class T> inline __m512i narrowed(const T* p, int64_t count) {
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(widened(p, count)));
}

// 16 words that follow each other along k, of which `count` elements exist.
template <bool PAIRS, class T> inline __m512 along(const T* p, int64_t count) {
  if constexpr (!PAIRS) return widened(p, count);
  else return (__m512)_mm512_cvtne2ps_pbh(widened(p + LANES, count - LANES), widened(p, count));
}
template <> inline __m512 along<true, bf16>(const bf16* p, int64_t count) {
  const __mmask32 mask = count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1;
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
}

// The words of 16 neighbouring o at one k. With PAIRS also at the next k; `next` is null beyond the end.
template <bool PAIRS, class T> inline __m512 across(const T* p, const T* next, int64_t count) {
  if constexpr (!PAIRS) return widened(p, count);
  const __m512i above = next ? _mm512_slli_epi32(narrowed(next, count), 16) : _mm512_setzero_si512();
  return _mm512_castsi512_ps(_mm512_or_si512(narrowed(p, count), above));
}

// While lines of 16 o are read, those of the next 16 are prefetched: they start elsewhere, where the hardware does not prefetch. With this and
// with tile's prefetch, logits and dW of 256 tokens in bf16 take 0.83 and 0.81 of the time on one core. In panels of 8 it gained nothing.
template <int64_t P, bool PAIRS, class T> void pack(const Factor& x, int64_t o, int64_t o_end, int64_t k, int64_t k_end, float* panels) {
  constexpr int64_t step = PAIRS ? 2 : 1;
  constexpr __mmask16 lanes = P < LANES ? (1 << P) - 1 : 0xffff;
  const int64_t words = (k_end - k + step - 1) / step;
  const T* data = static_cast<const T*>(x.data);
  if (x.inner == 1 && x.rows == nullptr) {
    for (; o < o_end; o += P, panels += P * words)
      for (int64_t s = 0; s < P; s += LANES)
        for (int64_t w = 0; w < words; w += LANES) {
          __m512 r[LANES];
#pragma GCC unroll 16
          for (int i = 0; i < LANES; ++i) {
            const bool there = i < P && o + s + i < o_end;
            if (P >= LANES && there) __builtin_prefetch(data + (o + s + i + LANES) * x.outer + k + w * step);
            r[i] = there ? along<PAIRS>(data + (o + s + i) * x.outer + k + w * step, k_end - k - w * step) : _mm512_setzero_ps();
          }
          transpose(r);
          for (int64_t i = 0; i < std::min(LANES, words - w); ++i) _mm512_mask_storeu_ps(panels + (w + i) * P + s, lanes, r[i]);
        }
    return;
  }
  const auto at = [&](int64_t j) { return data + (x.rows ? x.rows[j] : j) * x.inner; };
  for (int64_t w = 0; w < words; ++w) {  // row by row, because a row's panels follow each other in memory
    const int64_t j = k + w * step;
    const T *row = at(j), *next = PAIRS && j + 1 < k_end ? at(j + 1) : nullptr;
    float* panel = panels + w * P;
    for (int64_t p = o; p < o_end; p += P, panel += P * words)
      for (int64_t s = 0; s < P; s += LANES)
        _mm512_mask_storeu_ps(panel + s, lanes, across<PAIRS>(row + p + s, next ? next + p + s : nullptr, std::min(P, o_end - p) - s));
  }
}

template <int64_t P> void pack_any(const Factor& x, bool pairs, int64_t o, int64_t o_end, int64_t k, int64_t k_end, float* panels) {
  const auto with = [&](auto of_single, auto of_pairs) { (pairs ? of_pairs : of_single)(x, o, o_end, k, k_end, panels); };
  if (x.dtype == F32) with(pack<P, false, float>, pack<P, true, float>);
  else if (x.dtype == BF16) with(pack<P, false, bf16>, pack<P, true, bf16>);
  else with(pack<P, false, fp16>, pack<P, true, fp16>);
}

// Words that are summed in registers before the sums are added to memory. Summing 640 words in fp32 had 4 times MKL's error.
constexpr int64_t SUMMED = 128;

template <bool PAIRS> inline void tile(const float* left, const float* right, int64_t words, float* const* rows, int64_t M, int64_t N, bool add) {
  constexpr int64_t COLUMNS = RIGHT / LANES;
  for (int64_t i = 0; i < M; ++i)  // prefetched, so that they are in the cache when the sums are ready
    for (int64_t j = 0; j < COLUMNS; ++j) __builtin_prefetch(rows[i] + j * LANES, 1);
  do {
    __m512 sum[LEFT][COLUMNS];
#pragma GCC unroll 8
    for (int i = 0; i < LEFT; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < COLUMNS; ++j) sum[i][j] = _mm512_setzero_ps();
    for (int64_t w = std::min(SUMMED, words); w > 0; --w, left += LEFT, right += RIGHT) {
      const __m512 b[COLUMNS] = {_mm512_load_ps(right), _mm512_load_ps(right + LANES), _mm512_load_ps(right + 2 * LANES)};
#pragma GCC unroll 8
      for (int i = 0; i < LEFT; ++i) {
        const __m512 a = _mm512_set1_ps(left[i]);
#pragma GCC unroll 3
        for (int j = 0; j < COLUMNS; ++j)
          if constexpr (PAIRS) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)a, (__m512bh)b[j]);
          else sum[i][j] = _mm512_fmadd_ps(a, b[j], sum[i][j]);
      }
    }
    if (M == LEFT && N == RIGHT) {
#pragma GCC unroll 8
      for (int i = 0; i < LEFT; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < COLUMNS; ++j) {
          float* p = rows[i] + j * LANES;
          _mm512_storeu_ps(p, add ? _mm512_add_ps(_mm512_loadu_ps(p), sum[i][j]) : sum[i][j]);
        }
    } else {
      for (int64_t i = 0; i < M; ++i)
        for (int64_t j = 0; j < COLUMNS; ++j) {
          const __mmask16 mask = first(N - j * LANES);
          float* p = rows[i] + j * LANES;
          _mm512_mask_storeu_ps(p, mask, add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, p), sum[i][j]) : sum[i][j]);
        }
    }
    add = true;
  } while ((words -= SUMMED) > 0);
}

template <bool PAIRS> void multiply_of(const float* left, const float* right, int64_t words, const Product& out) {
  for (int64_t n = 0; n < out.N; n += RIGHT)
    for (int64_t m = 0; m < out.M; m += LEFT) {
      const int64_t M = std::min(LEFT, out.M - m);
      float* rows[LEFT] = {};
      for (int64_t i = 0; i < M; ++i) rows[i] = out.data + (out.rows ? out.rows[m + i] : m + i) * out.stride + n;
      tile<PAIRS>(left + m * words, right + n * words, words, rows, M, std::min(RIGHT, out.N - n), out.add);
    }
}

void multiply(const float* left, const float* right, bool pairs, int64_t words, const Product& out) {
  (pairs ? multiply_of<true> : multiply_of<false>)(left, right, words, out);
}

}  // namespace

extern const GemmKernels gemm_kernels;
const GemmKernels gemm_kernels = {pack_any<LEFT>, pack_any<RIGHT>, multiply};

}  // namespace avx512
}  // namespace fastalign
