// Policy losses, one token in each lane: value, gradient and the sums of all metrics in one read and one write. Torch-free.
//
//   d = logp - old_logp;   r = exp(d held within +-20);   policy = max(-A r, -A (r held within [lower, upper])), for A < 0 at most -A dual
//   loss = w (policy - entropy_coefficient H + kl_coefficient KL);   value = w max((v - R)^2, ((v held within old +- clip) - R)^2) / 2
//
// with w the token's scale. policy/losses.py has the reasons. Outside the mask every term is selected away instead of multiplied by 0, because
// memory there may hold NaN.
#pragma once

#include <cmath>
#include <cstring>

#include "../common/vectors.h"
#include "api.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

constexpr double LARGEST_EXPONENT = 20;

constexpr int64_t PARTIAL = 16;  // vectors summed in A before the sums are widened: fp32 alone would lose a digit by 1000 tokens

typedef float f32h __attribute__((vector_size(REGISTER / 2)));
struct Halves { f32h low, high; };
FA_INLINE f64v squares(f64v v) { return v * v; }
FA_INLINE f64v squares(f32v v) {
  const auto half = bit_cast<Halves>(v);
  return squares(__builtin_convertvector(half.low, f64v)) + squares(__builtin_convertvector(half.high, f64v));
}
FA_INLINE f64v widened(f64v v) { return v; }
FA_INLINE f64v widened(f32v v) {
  const auto half = bit_cast<Halves>(v);
  return __builtin_convertvector(half.low, f64v) + __builtin_convertvector(half.high, f64v);
}

// Widened in steps of two, which is a few instructions. GCC 12 converts bytes to i32 or i64 in one step lane by lane, with 60.
template <class I, int LANES> struct IntegersOf {
  typedef I type __attribute__((vector_size(sizeof(I) * LANES)));
};
template <class I, int LANES> using Integers = typename IntegersOf<I, LANES>::type;
template <class A> using Bytes = Integers<int8_t, Lanes<A>::count>;
FA_INLINE Lanes<float>::ivec widened(Bytes<float> v) {
  return __builtin_convertvector(__builtin_convertvector(v, Integers<int16_t, Lanes<float>::count>), Lanes<float>::ivec);
}
FA_INLINE Lanes<double>::ivec widened(Bytes<double> v) {
  constexpr int L = Lanes<double>::count;
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(v, Integers<int16_t, L>), Integers<int32_t, L>), Lanes<double>::ivec);
}

// A vector of tokens: WHOLE, or the last `count` ones. Tokens outside the mask or beyond `count` read as 0.
template <class A, bool WHOLE> struct Reader {
  using Mask = typename Lanes<A>::ivec;
  static constexpr int L = Lanes<A>::count;
  int64_t n, count;
  Mask inside;
  __attribute__((always_inline)) Reader(const bool* mask, int64_t n, int64_t count) : n(n), count(count) {
    Bytes<A> bytes = {};
    std::memcpy(&bytes, mask + n, WHOLE ? L : count);
    inside = widened(bytes != 0);
  }
  __attribute__((always_inline)) Vec<A> operator()(const void* p) const {
    const A* at = static_cast<const A*>(p) + n;
    return inside ? (WHOLE ? load_lanes(at) : load_some<A, A>(at, count, A(0))) : Vec<A>{};
  }
  __attribute__((always_inline)) Vec<A> scale(const Tokens& job) const {
    return job.scale_each ? (*this)(job.scale) : inside ? broadcast(*static_cast<const A*>(job.scale)) : Vec<A>{};
  }
  __attribute__((always_inline)) void store(void* p, Vec<A> v) const {
    A* at = static_cast<A*>(p) + n;
    if (WHOLE) return store_lanes(at, v);
    A padded[L];
    store_lanes(padded, v);
    std::memcpy(at, padded, count * sizeof(A));
  }
};

// e^x - 1 - x. For |x| < 0.5, where the difference cancels, by its series (the next term is 2e-9 of it).
FA_INLINE Vec<float> exp_minus_1_minus_x(Vec<float> x) {
  using V = Vec<float>;
  V p = broadcast(1.0f / 362880);
  p = p * x + 1.0f / 40320;
  p = p * x + 1.0f / 5040;
  p = p * x + 1.0f / 720;
  p = p * x + 1.0f / 120;
  p = p * x + 1.0f / 24;
  p = p * x + 1.0f / 6;
  p = p * x + 0.5f;
  return ((x < 0.5f) & (x > -0.5f)) ? p * x * x : exp_lanes(x) - 1.0f - x;
}
FA_INLINE Vec<double> exp_minus_1_minus_x(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = std::expm1(x[i]) - x[i];
  return x;
}

template <class A> struct KlTerm { Vec<A> value, slope; };
template <class A> FA_INLINE KlTerm<A> kl_term(Vec<A> d, int64_t estimator) {
  if (estimator == K1) return {d, broadcast(A(1))};
  if (estimator == K2) return {A(0.5) * d * d, d};
  const auto beyond = d < A(-LARGEST_EXPONENT);
  const Vec<A> x = beyond ? broadcast(A(LARGEST_EXPONENT)) : -d;
  const Vec<A> value = exp_minus_1_minus_x(x);
  return {value, beyond ? Vec<A>{} : -(value + x)};
}

template <class A, bool WHOLE> FA_INLINE void policy_vector(const PolicyJob& job, const Reader<A, WHOLE>& read, Vec<A>* totals) {
  using V = Vec<A>;
  const A lower = A(job.lower), upper = A(job.upper), dual = A(job.dual);
  const V one = read.inside ? broadcast(A(1)) : V{}, w = read.scale(job);
  const V logp = read(job.logp), d = logp - read(job.old_logp), minus_a = -read(job.advantages);
  const V above = d > A(LARGEST_EXPONENT) ? broadcast(A(LARGEST_EXPONENT)) : d;
  const V r = exp_lanes(above < A(-LARGEST_EXPONENT) ? broadcast(A(-LARGEST_EXPONENT)) : above);
  const V plain = minus_a * r;
  const auto high = (minus_a < A(0)) & (r > upper), low = (minus_a > A(0)) & (r < lower), doubly = (minus_a > A(0)) & (r > dual);
  const V policy = high ? minus_a * upper : doubly ? minus_a * dual : low ? minus_a * lower : plain;
  const auto clipped = high | low | doubly;
  V slope = (clipped | (d > A(LARGEST_EXPONENT)) | (d < A(-LARGEST_EXPONENT))) ? V{} : plain;
  V loss = policy;
  if (job.entropy != nullptr) {
    const V h = read(job.entropy);
    if (job.entropy_coefficient != 0) loss -= A(job.entropy_coefficient) * h;  // with 0 it is a metric alone, and 0 * inf would be NaN
    totals[ENTROPY_SUM] += h;
  }
  if (job.reference_logp != nullptr) {
    const auto kl = kl_term<A>(logp - read(job.reference_logp), job.kl_estimator);
    if (job.kl_coefficient != 0) {
      loss += A(job.kl_coefficient) * kl.value;
      slope += A(job.kl_coefficient) * kl.slope;
    }
    totals[KL] += kl.value;  // 0 outside the mask, where logp and reference_logp read as 0
  }
  totals[LOSS] += w * loss;
  totals[POLICY] += policy;
  totals[RATIO] += one * r;
  totals[CLIPPED] += policy != policy ? policy : clipped ? one : V{};  // a NaN counts as NaN
  totals[SQUARES] += A(0.5) * d * d;
  totals[TOKENS] += one;
  read.store(job.slopes, w * slope);
  if (job.entropy_slopes != nullptr) read.store(job.entropy_slopes, A(-job.entropy_coefficient) * w);
}

// In fp64, because a variance is the difference of two of them.
struct Moments { f64v target, target_square, error, error_square; };

template <class A, bool WHOLE> FA_INLINE void value_vector(const ValueJob& job, const Reader<A, WHOLE>& read, Vec<A>* totals, Moments& moments) {
  using V = Vec<A>;
  const A clip = A(job.clip);
  const V one = read.inside ? broadcast(A(1)) : V{}, w = read.scale(job);
  const V v = read(job.values), old = read(job.old_values), target = read(job.returns);
  const V lowest = old - clip, highest = old + clip;
  const V held = (v < lowest ? lowest : v > highest ? highest : v) - target, plain = v - target;
  const auto clipped = held * held > plain * plain;
  // Comparisons with NaN are false, so a NaN in old would get lost.
  const auto broken = old != old;
  const V worse = broken ? old : clipped ? held : plain;
  totals[V_LOSS] += A(0.5) * w * worse * worse;
  totals[V_CLIPPED] += worse != worse ? worse : clipped ? one : V{};
  totals[V_TOKENS] += one;
  moments.target += widened(target);
  moments.target_square += squares(target);
  moments.error += widened(plain);
  moments.error_square += squares(plain);
  read.store(job.slopes, broken ? old : clipped ? V{} : w * plain);
}

// Runs vector(reader, sums in A) over the tokens [begin, end), and adds up the sums in fp64.
template <class A, int COUNT, class Vector>
FA_INLINE void sum_tokens(const Tokens& job, int64_t begin, int64_t end, double* sums, Vector vector) {
  constexpr int L = Lanes<A>::count;
  f64v totals[COUNT] = {};
  for (int64_t n = begin; n < end;) {
    Vec<A> part[COUNT] = {};
    const int64_t stop = n + PARTIAL * L < end ? n + PARTIAL * L : end;
    for (; n + L <= stop; n += L) vector(Reader<A, true>(job.mask, n, L), part);
    if (n < stop) vector(Reader<A, false>(job.mask, n, stop - n), part);
    n = stop;
    for (int k = 0; k < COUNT; ++k) totals[k] += widened(part[k]);
  }
  for (int k = 0; k < COUNT; ++k) sums[k] = horizontal_sum<double>(totals[k]);
}

template <class A> static void policy_tokens(const PolicyJob& job, int64_t begin, int64_t end, double* sums) {
  sum_tokens<A, POLICY_SUMS>(job, begin, end, sums,
                             [&](const auto& read, Vec<A>* part) __attribute__((always_inline)) { policy_vector<A>(job, read, part); });
}

template <class A> static void value_tokens(const ValueJob& job, int64_t begin, int64_t end, double* sums) {
  Moments moments = {};
  sum_tokens<A, VALUE_SUMS>(job, begin, end, sums,
                            [&](const auto& read, Vec<A>* part) __attribute__((always_inline)) { value_vector<A>(job, read, part, moments); });
  sums[V_RETURN] = horizontal_sum<double>(moments.target);
  sums[V_RETURN_SQUARE] = horizontal_sum<double>(moments.target_square);
  sums[V_ERROR] = horizontal_sum<double>(moments.error);
  sums[V_ERROR_SQUARE] = horizontal_sum<double>(moments.error_square);
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
