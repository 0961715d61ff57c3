// The sampler's thresholds on a CPU: the lowest value that top-k or top-p keeps, from histograms of whole numbers, never from a sort.
#pragma once

#include <algorithm>

#include "api.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

// Maps a value between the lowest and the highest to a bucket, in order. In the first round buckets are equally wide, which spreads logits
// best. Later rounds split the order of floats itself, which ends after four rounds whatever the values.
struct Buckets {
  static constexpr int COUNT = 1024;
  bool linear;
  float low, scale;
  uint32_t first;
  int shift;

  FA_HD Buckets between(float low, float high, bool linear) {
    const uint32_t first = key_of(low), width = key_of(high) - first;
    int shift = 0;
    while (width >> shift >= COUNT) ++shift;
    return {linear && high - low < 1e30f && high - low > 1e-30f, low, (COUNT - 1) / (high - low), first, shift};
  }
  __attribute__((always_inline)) u32x16 of(f32x16 z) const {
    if (linear) return bit_cast<u32x16>(__builtin_convertvector((z - low) * scale, i32x16));
    const u32x16 bits = bit_cast<u32x16>(z + 0.0f);
    const u32x16 sign = bit_cast<u32x16>(bit_cast<i32x16>(bits) >> 31);
    return ((bits ^ (sign | 0x80000000u)) - first) >> shift;
  }
};

// The threshold of a filter: the lowest v for which the values above v have less mass than `target`. unit: every value has mass 1 (top-k);
// otherwise its fixed-point probability (top-p). `values` must hold the threshold. They are reordered, and memory for 16 more follows them.
// Each round leaves one bucket of 1024.
static float threshold(float* values, int64_t n, bool unit, double target, float top, float per_bit) {
  uint64_t masses[2][Buckets::COUNT];  // two, because a value in the same bucket as the one before would wait for its sum
  uint64_t above = 0;
  for (bool linear = true;; linear = false) {
    for (int64_t i = n; i % L; ++i) values[i] = values[0];
    f32x16 highs = load16(values), lows = highs;
    for (int64_t i = L; i < n; i += L) {
      const f32x16 z = load16(values + i);
      highs = larger(highs, z);
      lows = larger(-z, -lows) * -1.0f;
    }
    const float low = -largest(-lows), high = largest(highs);
    if (low == high) return low;
    const Buckets buckets = Buckets::between(low, high, linear);
    memset(masses, 0, sizeof masses);
    for (int64_t i = 0; i < n; i += L) {
      const f32x16 z = load16(values + i);
      const u32x16 bucket = buckets.of(z);
      uint64_t mass[L];
      uint32_t of_lane[L];
      memcpy(of_lane, &bucket, sizeof of_lane);
      const f32x16 e = exp2_of((z - top) * per_bit);
      for (int j = 0; j < L; ++j) mass[j] = unit ? 1 : fixed_mass(e[j]);
      const int count = n - i < L ? int(n - i) : L;
      if (count == L)
        for (int j = 0; j < L; ++j) masses[j % 2][of_lane[j]] += mass[j];
      else
        for (int j = 0; j < count; ++j) masses[0][of_lane[j]] += mass[j];
    }
    uint32_t chosen_bucket = buckets.of(splat(high, highs))[0];  // the lowest with less than target above it: holds a value, as the highest and 0 do
    while (chosen_bucket > 0) {
      const uint64_t in_bucket = masses[0][chosen_bucket] + masses[1][chosen_bucket];
      if (double(above + in_bucket) >= target) break;
      above += in_bucket;
      --chosen_bucket;
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += L) {
      const f32x16 z = load16(values + i);
      i32x16 selected = piecewise([=](auto bucket) FA_PIECE { return bucket == chosen_bucket; }, buckets.of(z));
      if (n - i < L)
        for (int j = int(n - i); j < L; ++j) selected[j] = 0;
      kept += append(values + kept, z, selected);
    }
    n = kept;
  }
}

// log2 of a relative probability below which top_p alone keeps nothing: all values below it have at most (1 - top_p) of the mass.
//
// Chunks are sorted into quarter bits by their largest value. Below an edge lie the whole chunks under it and, of each chunk above it, at
// most all values but the largest: 255 values of the edge's size.
FA_HD float top_p_floor(const Summaries& s, int64_t chunks, float top, float per_bit, double top_p, double sum) {
  constexpr int EDGES = 256;
  const double budget = sum * ((1.0 - top_p) * 0.999 - 4e-6);  // less, by more than all roundings of fixed_mass and the sums
  if (!(budget > 0)) return -INFINITY;
  double whole[EDGES] = {}, rest[EDGES] = {};
  int32_t count[EDGES] = {};
  double below = 0, rest_above = 0;
  int64_t n = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    const float t = (s.top[c] - top) * per_bit;
    const int edge = t > -63.75f ? int(t * -4.0f) : EDGES - 1;
    const double scale = exp2_of(t);
    whole[edge] += s.sum[c] * scale;
    rest[edge] += (s.sum[c] - 1.0) * scale;
    ++count[edge];
    below += s.sum[c] * scale;
  }
  for (int edge = 0; edge < EDGES - 1; ++edge) {
    below -= whole[edge];
    rest_above += rest[edge];
    n += count[edge];
    const float floor = -0.25f * float(edge + 1);
    if (below + std::min(rest_above, 255.0 * double(n) * exp2_of(floor)) <= budget) return floor - 0.01f;
  }
  return -INFINITY;
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
