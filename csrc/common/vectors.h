// Vector arithmetic of the CPU kernels: exp, tanh, sums and maxima over lanes. Torch-free.
//
// Vectors are GCC/Clang vector extensions, as wide as a register of the target.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtypes.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

template <class A> struct Lanes;
template <> struct Lanes<float> {
  static constexpr int count = REGISTER / sizeof(float);
  typedef f32v vec;
  typedef int32_t ivec __attribute__((vector_size(REGISTER)));
};
template <> struct Lanes<double> {
  static constexpr int count = REGISTER / sizeof(double);
  typedef f64v vec;
  typedef int64_t ivec __attribute__((vector_size(REGISTER)));
};
template <class A> using Vec = typename Lanes<A>::vec;

#define FA_INLINE static inline __attribute__((always_inline))

template <class A> FA_INLINE Vec<A> broadcast(A x) { return x - Vec<A>{}; }

// exp for finite or -inf arguments <= ~88, 1.1 ulp: x = n ln2 + r with |r| <= ln2/2, Taylor to r^7 (next term 5e-9), 2^n by exponent bits.
// Arguments below -87 give 0: 2^-126 adds nothing to a sum that holds a 1. NaN passes through every step.
FA_INLINE Vec<float> exp_lanes(Vec<float> x) {
  using V = Vec<float>;
  const V low = broadcast(-87.0f);
  const auto tiny = x < low;
  const V clamped = tiny ? low : x;
  const V shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer in the low bits
  const V n = shifted - 12582912.0f;
  const V r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  u32v bits;  // unsigned, because the sum wraps for arguments outside the domain, whose value is not used
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;  // the integer n sits in the low mantissa bits
  V scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return tiny ? V{} : p * scale;
}

// libm lane by lane: fp64 serves gradient checks, not speed.
FA_INLINE Vec<double> exp_lanes(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = std::exp(x[i]);
  return x;
}

// tanh and its derivative, 2 ulp. With t = e^-2|x|: tanh |x| = 1 - 2 t / (1 + t). Below 0.25, where that cancels, the odd Taylor series.
// The derivative is 4 t / (1 + t)^2. (1 - h)(1 + h) of a rounded h near 1 would lose its digits: it is off by 0.5 % at |x| = 6.
template <class A> struct Tanh {
  Vec<A> value, slope;
};
FA_INLINE Tanh<float> tanh_lanes(Vec<float> x) {
  using V = Vec<float>;
  const V s = x * x;
  V p = broadcast(-1382.0f / 155925);
  p = p * s + 62.0f / 2835;
  p = p * s - 17.0f / 315;
  p = p * s + 2.0f / 15;
  p = p * s - 1.0f / 3;
  const V near = x + x * s * p;
  const V magnitude = x < 0.0f ? -x : x;
  const V t = exp_lanes(-2.0f * magnitude), inverse = 1.0f / (1.0f + t);
  const V far = 1.0f - 2.0f * (t * inverse);
  return {magnitude < 0.25f ? near : (x < 0.0f ? -far : far), 4.0f * t * inverse * inverse};
}
FA_INLINE Tanh<double> tanh_lanes(Vec<double> x) {
  Tanh<double> at;
  for (int i = 0; i < Lanes<double>::count; ++i) {
    const double t = std::exp(-2 * std::fabs(x[i]));
    at.value[i] = std::tanh(x[i]);
    at.slope[i] = 4 * t / ((1 + t) * (1 + t));
  }
  return at;
}

template <class A> FA_INLINE Vec<A> max_lanes(Vec<A> a, Vec<A> b) { return b > a ? b : a; }
// In fp64: fp32 would round a confident row's 1 + 8e-7 three times, and halve log(sum), which is all that is left of its loss.
template <class A> FA_INLINE double horizontal_sum(Vec<A> v) {
  double sum = 0;
  for (int i = 0; i < Lanes<A>::count; ++i) sum += v[i];
  return sum;
}
template <class A> FA_INLINE A horizontal_max(Vec<A> v) {
  A top = v[0];
  for (int i = 1; i < Lanes<A>::count; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// n <= Lanes::count values from p, the rest of the vector is `fill`.
template <class T, class A> FA_INLINE Vec<A> load_some(const T* p, int64_t n, A fill) {
  T padded[Lanes<A>::count];
  std::memcpy(padded, p, n * sizeof(T));
  for (int64_t i = n; i < Lanes<A>::count; ++i) padded[i] = T{};
  Vec<A> v = load_lanes(padded);
  for (int64_t i = n; i < Lanes<A>::count; ++i) v[i] = fill;
  return v;
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
