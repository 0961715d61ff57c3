// The sampler's arithmetic: exp2, log, Philox4x32-10 and its exponentials, the order and the fixed-point mass of logits.
//
// One source serves g++, nvcc's host and nvcc's device, for single values and for vectors. All of them give the same bits, because every
// rounding is written down: fused multiply-adds are explicit, and files that include this compile with -ffp-contract=off (nvcc: -fmad=false).
// kernels/fastalign_kernels/sampling.py says what the functions are for.
#pragma once

#include <cmath>

#include "../common/portable.h"

namespace fastalign {

constexpr int CHUNK = 256;         // ids whose summary is one; fixed, so that every split of a row gives the same sums
constexpr int CHUNK_LANES = 32;    // partial sums of a chunk: id i adds to lane i % 32, then lanes are halved 16, 8, 4, 2, 1
constexpr int COMBINE_LANES = 256; // partial sums of a row: chunk c adds to lane c % 256, then lanes are halved 128, ..., 1
constexpr int MAX_CHUNKS = 4096;   // V up to 2^20
constexpr float LOG2E = 1.44269504088896341f;
constexpr double LN2 = 0.693147180559945309;

namespace FASTALIGN_TARGET {

FA_HD float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
FA_HD float chosen(bool yes, float a, float b) { return yes ? a : b; }
FA_HD bool exceeds(float a, float b) { return a > b; }
FA_HD float splat(float x, float) { return x; }
FA_HD uint32_t splat(uint32_t x, uint32_t) { return x; }
FA_HD uint32_t bits_of(float x) { return bit_cast<uint32_t>(x); }
FA_HD float floats_of(uint32_t x) { return bit_cast<float>(x); }
FA_HD float converted(uint32_t x) { return float(int32_t(x)); }
FA_HD void multiply(uint32_t a, uint32_t factor, uint32_t& high, uint32_t& low) {
  const uint64_t product = uint64_t(a) * factor;
  high = uint32_t(product >> 32);
  low = uint32_t(product);
}
FA_HD float fraction(uint32_t high, uint32_t low) {  // (high 2^32 + (low | 1)) / 2^64, rounded once
  return float(uint64_t(high) << 32 | low | 1) * 0x1p-64f;
}
FA_HD float power_of_two(float shifted) {  // 2^n for the n that the low mantissa bits of n + 1.5 * 2^23 hold
  return bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
}
// The integer nearest to x, and p 2^n, both exact, given shifted = x + 1.5 * 2^23.
FA_HD float nearest(float, float shifted) { return shifted - 12582912.0f; }
FA_HD float scaled(float p, float, float shifted) { return p * power_of_two(shifted); }

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign

#ifndef __CUDACC__
#include "lanes.h"
#endif

namespace fastalign {
namespace FASTALIGN_TARGET {

// 2^t for t <= 0, -inf or NaN (which passes), 0.6 ulp; below 2^-126: 2^-126, which adds nothing to a sum that holds a 1, and times itself is 0.
// t = n + r with |r| <= 1/2; the polynomial is the minimax one of degree 6, relative error 2e-9, with exp2(0) = 1.
template <class F> FA_HD F clamped(F t) {
  const F low = splat(-126.0f, t);
  return chosen(exceeds(low, t), low, t);
}
#ifdef __CUDA_ARCH__
FA_HD float clamped(float t) {  // one instruction
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(t), "f"(-126.0f));
  return larger;
}
#endif
template <class F> FA_HD F exp2_fraction(F r) {
  F p = splat(0.00015353361959569156f, r);
  p = fused(p, r, splat(0.0013398875016719103f, r));
  p = fused(p, r, splat(0.00961843691766262f, r));
  p = fused(p, r, splat(0.055503323674201965f, r));
  p = fused(p, r, splat(0.24022647738456726f, r));
  p = fused(p, r, splat(0.6931471824645996f, r));
  return fused(p, r, splat(1.0f, r));
}
template <class F> FA_HD F exp2_of(F t) {
  const F whole = clamped(t), shifted = whole + splat(12582912.0f, t);
  const F n = nearest(whole, shifted);
  return scaled(exp2_fraction(whole - n), n, shifted);
}
// exp2_of(t) for a t that is clamped already, in three instructions less. The product with 2^n is an addition to the exponent, which is exact
// because p >= 1 where n = -126. A NaN gives some number.
FA_HD float exp2_of_clamped(float t) {
  const float shifted = t + 12582912.0f;
  return floats_of(bits_of(exp2_fraction(t - nearest(t, shifted))) + (bits_of(shifted) << 23));
}

// Natural log of a positive normal double, 1e-15: x = 2^e m with m in [0.71, 1.42], log m = 2 atanh((m - 1) / (m + 1)).
FA_HD double log_of(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x);
  int64_t e = int64_t(bits >> 52) - 1023;
  double m = bit_cast<double>((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    e += 1;
  }
  const double r = (m - 1.0) / (m + 1.0), s = r * r;
  double sum = 0;
  for (int k = 21; k >= 1; k -= 2) sum = sum * s + 1.0 / k;
  return double(e) * LN2 + 2.0 * r * sum;
}

// Multiplier of z - max that makes it a power of two of probability; finite even for subnormal temperatures.
FA_HD float per_bit(float temperature) {
  const float k = LOG2E / temperature;
  return k < 3e38f ? k : 3e38f;
}

// Logit order as unsigned order; -0 and 0 are equal logits. NaN does not come here.
FA_HD uint32_t key_of(float z) {
  const uint32_t bits = bit_cast<uint32_t>(z + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
FA_HD float logit_of(uint32_t key) { return bit_cast<float>(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

// A probability relative to the row's largest, as a whole number of 2^-40: sums of them are exact, whatever their order, up to V = 2^20,
// so that top-p's threshold does not depend on how a row is searched.
FA_HD uint64_t fixed_mass(float relative) { return uint64_t(int64_t(relative * 1099511627776.0f)); }

FA_HD float penalised(float x, float penalty) { return x < 0 ? x * penalty : x / penalty; }

struct Noise {
  uint64_t seed, sequence;
  uint32_t position;
};
constexpr uint32_t CHUNK_TAG = 0x80000000u;  // counters of chunks, apart from those of ids

// E ~ Exp(1) for the noise and an index (or a vector of them): E = -log(1 - u) with u the first 64 bits of Philox4x32-10 (Salmon et al.,
// SC 2011), to fp32's relative precision at both ends: where u < 0.29 the logarithm's series starts at u itself, else at 1 - u from the
// inverted bits. 24-bit uniforms would end at E = 2^-24, and no tail token below e^-17 would ever win.
template <class F, class W> FA_HD F exponential(const Noise& noise, W index) {
  W c0 = index, c1 = splat(noise.position, index), c2 = splat(uint32_t(noise.sequence), index), c3 = splat(uint32_t(noise.sequence >> 32), index);
  uint32_t k0 = uint32_t(noise.seed), k1 = uint32_t(noise.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    W high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const F u = fraction(c0, c1), left = fraction(~c0, ~c1);
  const auto near = exceeds(splat(0.29289323f, u), u);
  W exponent = (bits_of(left) >> 23) - 127u;
  F m = floats_of((bits_of(left) & 0x7fffffu) | 0x3f800000u);
  const auto upper = exceeds(m, splat(1.41421356f, m));
  m = chosen(upper, m * splat(0.5f, m), m);
  const F e = chosen(near, splat(0.0f, u), converted(exponent) + chosen(upper, splat(1.0f, m), splat(0.0f, m)));
  const F above = chosen(near, -u, m - splat(1.0f, m)), below = chosen(near, splat(2.0f, u) - u, m + splat(1.0f, m));
  const F r = above / below, s = r * r;  // log((1 - u) / 2^e) = 2 atanh r
  F p = fused(s, splat(1.0f / 9, s), splat(1.0f / 7, s));
  p = fused(p, s, splat(1.0f / 5, s));
  p = fused(p, s, splat(1.0f / 3, s));
  p = fused(p * s, r, r);
  return -fused(e, splat(0.693147181f, e), splat(2.0f, p) * p);
}

// The lead of a race: the lowest score, and of equal ones the lowest index. Scores of mass 0 are not entered.
struct Lead {
  float score;
  uint32_t index;
};
constexpr uint32_t NOBODY = 0xffffffffu;
FA_HD bool leads(const Lead& a, const Lead& b) { return a.score < b.score || (a.score == b.score && a.index < b.index); }

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
