// 8-bit matrix products in AVX-512 VNNI: rows are coded and packed into panels, and panels multiplied. api.h has the formats.
#include "api.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "../common/vectors512.h"

namespace fastalign {
namespace avx512 {
namespace {

constexpr float TINY = 1e-30f;  // a row of smaller numbers is coded as zeros: 127 / max would overflow

char* aligned_memory(int64_t bytes) {
  void* memory = std::aligned_alloc(64, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

// Memory of one row while it is coded.
struct Row {
  std::unique_ptr<char, void (*)(void*)> memory;
  float* y;
  int8_t* q;
  explicit Row(int64_t width)
      : memory(aligned_memory((width + 63) / 64 * 320 + 64), std::free),
        y(reinterpret_cast<float*>(memory.get())),
        q(reinterpret_cast<int8_t*>(memory.get()) + (width + 63) / 64 * 256) {}
};

template <class T> inline void load(const CodedRows& x, int64_t o, int64_t padded, float* y) {
  const T* p = static_cast<const T*>(x.data) + o * x.stride;
  for (int64_t k = 0; k < padded; k += LANES) _mm512_store_ps(y + k, k < x.K ? widened(p + k, x.K - k) : _mm512_setzero_ps());
}

// y = R (s * y). Strides below 16 lie within a vector.
inline void rotate(float* y, int64_t width, int64_t block) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i sign_bit = _mm512_set1_epi32(int32_t(0x80000000));
  const __m512 norm = _mm512_set1_ps(float(1 / std::sqrt(double(block))));
  for (int64_t k = 0; k < width; k += LANES) {
    const __m512i hash = _mm512_mullo_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(int32_t(k + 1))), _mm512_set1_epi32(int32_t(0x9e3779b1)));
    const __m512i mixed = _mm512_mullo_epi32(_mm512_xor_si512(hash, _mm512_srli_epi32(hash, 15)), _mm512_set1_epi32(int32_t(0x85ebca6b)));
    __m512 v = _mm512_mul_ps(_mm512_load_ps(y + k), norm);
    v = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(v), _mm512_and_si512(mixed, sign_bit)));
#pragma GCC unroll 4
    for (int h = 1; h < LANES; h *= 2) {
      const __m512i partner = _mm512_xor_si512(lane, _mm512_set1_epi32(h));
      const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(h));
      const __m512 other = _mm512_permutexvar_ps(partner, v);
      v = _mm512_mask_sub_ps(_mm512_add_ps(other, v), upper, other, v);
    }
    _mm512_store_ps(y + k, v);
  }
  for (int64_t h = LANES; h < block; h *= 2)
    for (int64_t k = 0; k < width; k += 2 * h)
      for (int64_t i = k; i < k + h; i += LANES) {
        const __m512 a = _mm512_load_ps(y + i), b = _mm512_load_ps(y + i + h);
        _mm512_store_ps(y + i, _mm512_add_ps(a, b));
        _mm512_store_ps(y + i + h, _mm512_sub_ps(a, b));
      }
}

// B y [LOW].
inline __m512 along_basis(const float* y, const float* basis, int64_t width) {
  __m512 sum[LOW];
#pragma GCC unroll 16
  for (int r = 0; r < LOW; ++r) sum[r] = _mm512_setzero_ps();
  for (int64_t k = 0; k < width; k += LANES) {
    const __m512 v = _mm512_load_ps(y + k);
#pragma GCC unroll 16
    for (int r = 0; r < LOW; ++r) sum[r] = _mm512_fmadd_ps(v, _mm512_loadu_ps(basis + r * width + k), sum[r]);
  }
  transpose(sum);
  __m512 total = sum[0];
#pragma GCC unroll 16
  for (int r = 1; r < LOW; ++r) total = _mm512_add_ps(total, sum[r]);
  return total;
}

inline void subtract_basis(float* y, const float* basis, int64_t width, const float (&along)[LOW]) {
  for (int64_t k = 0; k < width; k += LANES) {
    __m512 v = _mm512_load_ps(y + k);
    for (int r = 0; r < LOW; ++r) v = _mm512_fnmadd_ps(_mm512_set1_ps(along[r]), _mm512_loadu_ps(basis + r * width + k), v);
    _mm512_store_ps(y + k, v);
  }
}

struct Quantised {
  float scale, residual, norm;  // residual, norm: lengths of y - scale q and of scale q
};

// q of y, and y becomes what q leaves. The scale is NaN if y has NaN or an infinity.
inline Quantised quantise(float* y, int8_t* q, int64_t padded) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 finite = 0xffff;
  const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  for (int64_t k = 0; k < padded; k += LANES) {
    const __m512 magnitude = _mm512_abs_ps(_mm512_load_ps(y + k));
    finite &= _mm512_cmp_ps_mask(magnitude, infinity, _CMP_LT_OQ);
    largest = _mm512_max_ps(largest, magnitude);
  }
  const float most = _mm512_reduce_max_ps(largest);
  const bool coded = finite == 0xffff && most >= TINY;
  const float scale = coded ? most / 127 : 0;
  const __m512 inverse = _mm512_set1_ps(coded ? 127 / most : 0), step = _mm512_set1_ps(scale);
  __m512 left = _mm512_setzero_ps(), size = _mm512_setzero_ps();
  for (int64_t k = 0; k < padded; k += LANES) {
    const __m512 v = _mm512_load_ps(y + k);
    const __m512i code = coded ? _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)) : _mm512_setzero_si512();
    const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(code), step), rest = _mm512_sub_ps(v, value);
    _mm_store_si128(reinterpret_cast<__m128i*>(q + k), _mm512_cvtepi32_epi8(code));
    _mm512_store_ps(y + k, rest);
    left = _mm512_fmadd_ps(rest, rest, left);
    size = _mm512_fmadd_ps(value, value, size);
  }
  if (finite != 0xffff) return {NAN, NAN, NAN};
  return {scale, std::sqrt(_mm512_reduce_add_ps(left)), std::sqrt(_mm512_reduce_add_ps(size))};
}

struct Code {
  float scale = 1, norms[2] = {0, 0}, low[LOW] = {};
};

template <bool IS_LEFT> Code code_row(const CodedRows& x, int64_t o, int64_t padded, const Row& row) {
  Code code;
  if (x.dtype == CODED_I8) {
    std::copy_n(static_cast<const int8_t*>(x.data) + o * x.stride, x.K, row.q);
    std::fill(row.q + x.K, row.q + padded, int8_t(0));
    return code;
  }
  if (x.dtype == CODED_F32) load<float>(x, o, padded, row.y);
  else if (x.dtype == CODED_BF16) load<bf16>(x, o, padded, row.y);
  else load<fp16>(x, o, padded, row.y);
  if (x.block) rotate(row.y, x.width, x.block);
  if (x.basis) {
    _mm512_storeu_ps(code.low, along_basis(row.y, x.basis, x.width));
    if (IS_LEFT) subtract_basis(row.y, x.basis, x.width, code.low);
  }
  double outside = 0;  // the square of the right factor's length without its part along B
  if (!IS_LEFT) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < padded; k += LANES) sum = _mm512_fmadd_ps(_mm512_load_ps(row.y + k), _mm512_load_ps(row.y + k), sum);
    outside = _mm512_reduce_add_ps(sum);
    for (const float a : code.low) outside -= double(a) * a;
  }
  const Quantised quantised = quantise(row.y, row.q, padded);
  if (IS_LEFT && x.basis) _mm512_storeu_ps(code.low, _mm512_add_ps(_mm512_loadu_ps(code.low), along_basis(row.y, x.basis, x.width)));
  code.scale = quantised.scale;
  code.norms[0] = quantised.residual;
  code.norms[1] = IS_LEFT ? quantised.norm : float(std::sqrt(std::max(outside, 0.0)));
  return code;
}

template <int64_t P> void pack(const CodedRows& x, const CodedPanels& panels, int64_t first_panel, int64_t last_panel, float* norms) {
  constexpr bool IS_LEFT = P == CODED_LEFT;
  const int64_t words = panels.words, padded = (x.width + 63) / 64 * 64, low = panels.low;
  const Row row(padded);
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    int32_t* const sums = panels.data + panel * (IS_LEFT ? panels.left_size() : panels.right_size());
    float* const scales = reinterpret_cast<float*>(IS_LEFT ? sums : sums + P);
    float* const lows = scales + P;
    int32_t* const codes = reinterpret_cast<int32_t*>(lows + low * P);
    for (int64_t i = 0; i < P; ++i) {
      const int64_t o = panel * P + i;
      Code code;
      if (o < x.O) {
        code = code_row<IS_LEFT>(x, o, padded, row);
        norms[o] = code.norms[0];
        norms[x.O + o] = code.norms[1];
      } else {
        std::fill(row.q, row.q + padded, int8_t(0));
        code.scale = 0;
      }
      int32_t sum = 0;
      for (int64_t k = 0; k < padded; ++k) sum += row.q[k];
      if (!IS_LEFT) sums[i] = -128 * sum;
      scales[i] = code.scale;
      for (int64_t r = 0; r < low; ++r) lows[r * P + i] = code.low[r];
      const int32_t shift = IS_LEFT ? int32_t(0x80808080) : 0;
      for (int64_t w = 0; w < words; ++w) {
        int32_t word;
        std::memcpy(&word, row.q + 4 * w, sizeof word);
        codes[w * P + i] = word ^ shift;
      }
    }
  }
}

// In each lane of 32 bits a polynomial of the row's words with an odd factor; the lanes likewise.
void digest(const CodedRows& x, int64_t first_row, int64_t last_row, int64_t* out) {
  const int64_t size = x.dtype == CODED_F32 ? 4 : x.dtype == CODED_I8 ? 1 : 2, bytes = x.K * size;
  const __m512i factor = _mm512_set1_epi32(int32_t(0x9e3779b1));
  for (int64_t o = first_row; o < last_row; ++o) {
    const char* row = static_cast<const char*>(x.data) + o * x.stride * size;
    __m512i lanes[4] = {};
    int64_t k = 0;
    for (; k + 256 <= bytes; k += 256)
      for (int j = 0; j < 4; ++j) lanes[j] = _mm512_add_epi32(_mm512_mullo_epi32(lanes[j], factor), _mm512_loadu_si512(row + k + 64 * j));
    for (; k < bytes; k += 64) {
      const int64_t count = std::min<int64_t>(64, bytes - k);
      const __mmask64 there = count == 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1;
      lanes[0] = _mm512_add_epi32(_mm512_mullo_epi32(lanes[0], factor), _mm512_maskz_loadu_epi8(there, row + k));
    }
    uint64_t hash = 0;
    alignas(64) uint32_t words[LANES];
    for (int j = 0; j < 4; ++j) {
      _mm512_store_si512(words, lanes[j]);
      for (const uint32_t word : words) hash = hash * 0x9e3779b97f4a7c15u + word;
    }
    out[o] = int64_t(hash);
  }
}

constexpr int64_t COLUMNS = CODED_RIGHT / LANES;

// In assembly, because GCC 12 copies each sum to another register and to the stack around the intrinsic: half the speed.
inline void add_products(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

void tile(const int32_t* left, const int32_t* right, int64_t words, int64_t low, float* out, int64_t stride, int64_t M, int64_t N) {
  const float *left_scale = reinterpret_cast<const float*>(left), *left_low = left_scale + CODED_LEFT;
  const float *right_scale = reinterpret_cast<const float*>(right) + CODED_RIGHT, *right_low = right_scale + CODED_RIGHT;
  const int32_t *a = left + CODED_LEFT * (1 + low), *b = right + CODED_RIGHT * (2 + low);
  __m512i sum[CODED_LEFT][COLUMNS];
#pragma GCC unroll 8
  for (int i = 0; i < CODED_LEFT; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < COLUMNS; ++j) sum[i][j] = _mm512_loadu_si512(right + j * LANES);
  for (int64_t w = 0; w < words; ++w, a += CODED_LEFT, b += CODED_RIGHT) {
    const __m512i column[COLUMNS] = {_mm512_loadu_si512(b), _mm512_loadu_si512(b + LANES), _mm512_loadu_si512(b + 2 * LANES)};
#pragma GCC unroll 8
    for (int i = 0; i < CODED_LEFT; ++i) {
      const __m512i row = _mm512_set1_epi32(a[i]);
#pragma GCC unroll 3
      for (int j = 0; j < COLUMNS; ++j) add_products(sum[i][j], row, column[j]);
    }
  }
  __m512 z[CODED_LEFT][COLUMNS];
#pragma GCC unroll 8
  for (int i = 0; i < CODED_LEFT; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < COLUMNS; ++j)
      z[i][j] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][j]), _mm512_loadu_ps(right_scale + j * LANES)), _mm512_set1_ps(left_scale[i]));
  for (int64_t r = 0; r < low; ++r, left_low += CODED_LEFT, right_low += CODED_RIGHT) {
    const __m512 column[COLUMNS] = {_mm512_loadu_ps(right_low), _mm512_loadu_ps(right_low + LANES), _mm512_loadu_ps(right_low + 2 * LANES)};
#pragma GCC unroll 8
    for (int i = 0; i < CODED_LEFT; ++i) {
      const __m512 row = _mm512_set1_ps(left_low[i]);
#pragma GCC unroll 3
      for (int j = 0; j < COLUMNS; ++j) z[i][j] = _mm512_fmadd_ps(row, column[j], z[i][j]);
    }
  }
  if (M == CODED_LEFT && N == CODED_RIGHT) {
#pragma GCC unroll 8
    for (int i = 0; i < CODED_LEFT; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < COLUMNS; ++j) _mm512_storeu_ps(out + i * stride + j * LANES, z[i][j]);
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < CODED_LEFT; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < COLUMNS; ++j)
      if (i < M) _mm512_mask_storeu_ps(out + i * stride + j * LANES, first(N - j * LANES), z[i][j]);
}

void multiply(const CodedPanels& left, const CodedPanels& right, int64_t M, int64_t N, float* out, int64_t stride) {
  const int32_t* b = right.data;
  for (int64_t n = 0; n < N; n += CODED_RIGHT, b += right.right_size()) {
    const int32_t* a = left.data;
    for (int64_t m = 0; m < M; m += CODED_LEFT, a += left.left_size())
      tile(a, b, left.words, left.low, out + m * stride + n, stride, std::min(CODED_LEFT, M - m), std::min(CODED_RIGHT, N - n));
  }
}

}  // namespace

extern const CodedKernels coded_kernels;
const CodedKernels coded_kernels = {pack<CODED_LEFT>, pack<CODED_RIGHT>, digest, multiply};

}  // namespace avx512
}  // namespace fastalign
