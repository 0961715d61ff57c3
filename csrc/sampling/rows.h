// The sampler on a CPU, one row at a time. One read writes the summaries of chunks; filters and the race then read what the summaries leave.
//
// The summaries bound which chunks can hold a kept id. On a peaked softmax the second part reads a few chunks. On a flat softmax it reads the
// row two or three times from the L2 cache. Thresholds come from histograms of whole numbers, never from a sort.
#pragma once

#include <algorithm>

#include "api.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

constexpr int VECTORS = CHUNK / L;
// How far loops over the vectors of a chunk are unrolled: wholly, so that its logits and sums stay in registers. AVX2 and SSE2 have too few.
constexpr int UNROLLED = REGISTER > 32 ? VECTORS : 1;

// The 32 lanes of a chunk, halved.
FA_HD float tree_sum(f32x16 low, f32x16 high) {
  return halved(low + high, [](auto a, auto b) { return a + b; });
}

template <class T> struct Row {
  const T* x;
  int64_t V;
  const int32_t *seen, *allowed;
  float penalty;

  FA_HD Row of(const SampleJob& job, int64_t row, float penalty) {
    const int64_t words = (job.V + 31) / 32;
    return {static_cast<const T*>(job.logits) + row * job.row_stride, job.V, job.seen && penalty != 1 ? job.seen + row * words : nullptr,
            job.allowed ? job.allowed + row * words : nullptr, penalty};
  }
};

// All ones where the id's bit is set: 16 ids from `first`, a multiple of 16.
FA_HD i32x16 bits_at(const int32_t* words, int64_t first) {
  constexpr u32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const uint32_t half = uint32_t(words[first / 32]) >> (first % 32);
  return -bit_cast<i32x16>((u32x16{} + half) >> lane & 1u);
}

// The raw logits of a chunk, -inf beyond V.
template <class T> FA_HD void load_raw(const Row<T>& row, int64_t chunk, f32x16* x) {
  const int64_t first = chunk * CHUNK;
  if (first + CHUNK <= row.V) {
#pragma GCC unroll UNROLLED
    for (int i = 0; i < VECTORS; ++i) x[i] = load16(row.x + first + i * L);
    return;
  }
  T padded[CHUNK] = {};
  memcpy(padded, row.x + first, (row.V - first) * sizeof(T));
  for (int i = 0; i < VECTORS; ++i) {
    x[i] = load16(padded + i * L);
    for (int j = 0; j < L; ++j)
      if (first + i * L + j >= row.V) x[i][j] = -INFINITY;
  }
}

// Raw logits to z, in place.
template <class T> FA_HD void mask(const Row<T>& row, int64_t chunk, f32x16* x) {
  for (int i = 0; i < VECTORS; ++i) {
    const int64_t first = chunk * CHUNK + i * L;
    if (first >= row.V) break;
    if (row.seen) {
      const f32x16 penalised = chosen(exceeds(f32x16{}, x[i]), x[i] * row.penalty, x[i] / row.penalty);
      x[i] = chosen(bits_at(row.seen, first), penalised, x[i]);
    }
    if (row.allowed) x[i] = chosen(bits_at(row.allowed, first), x[i], splat(-INFINITY, x[i]));
  }
}
template <class T> FA_HD void load(const Row<T>& row, int64_t chunk, f32x16* z) {
  load_raw(row, chunk, z);
  if (row.seen || row.allowed) mask(row, chunk, z);
}

FA_HD float top_of(const f32x16* x) {
  f32x16 a = splat(-INFINITY, x[0]), b = a;
#pragma GCC unroll UNROLLED
  for (int i = 0; i < VECTORS; i += 2) {
    a = larger(a, x[i]);
    b = larger(b, x[i + 1]);
  }
  return largest(larger(a, b));
}
FA_HD float reference_of(float top) { return top == -INFINITY ? 0.0f : top; }  // -inf - -inf is NaN

FA_HD float sum_of(const f32x16* z, float top, float per_bit) {
  f32x16 s[2] = {};
#pragma GCC unroll UNROLLED
  for (int i = 0; i < VECTORS; ++i) s[i % 2] += exp2_of((z[i] - reference_of(top)) * per_bit);
  return tree_sum(s[0], s[1]);
}

FA_HD int32_t finite_of(const f32x16* z) {
  i32x16 finite = {};
  for (int i = 0; i < VECTORS; ++i) finite -= exceeds(z[i], splat(-INFINITY, z[i]));
  int32_t count = 0;
  for (int i = 0; i < L; ++i) count += finite[i];
  return count;
}

// TEMPERED: z's sum is not the raw one.
template <bool TEMPERED, class T> FA_HD void summarise_chunk(const Row<T>& row, int64_t chunk, float per_bit, const Summaries& out) {
  f32x16 x[VECTORS];
  load_raw(row, chunk, x);
  // As in rows.h: the hardware prefetcher stops at every 4 KiB page.
#pragma GCC unroll UNROLLED
  for (int i = 0; i < CHUNK; i += 64 / sizeof(T)) __builtin_prefetch(row.x + chunk * CHUNK + 2048 / sizeof(T) + i);
  const float top = top_of(x), reference = reference_of(top);
  f32x16 sum[2] = {}, weighted[2] = {}, tempered[2] = {};
  f32x16 lowest = x[0];
#pragma GCC unroll UNROLLED
  for (int i = 0; i < VECTORS; ++i) {
    const f32x16 d = x[i] - reference, t = d * LOG2E, e = exp2_of(t);
    sum[i % 2] += e;
    weighted[i % 2] = fused(clamped(t), e, weighted[i % 2]);
    lowest = chosen(exceeds(x[i], lowest), lowest, x[i]);
    if (TEMPERED) tempered[i % 2] += exp2_of(d * per_bit);
  }
  out.raw_top[chunk] = out.top[chunk] = top;
  out.raw_sum[chunk] = out.sum[chunk] = tree_sum(sum[0], sum[1]);
  out.raw_weighted[chunk] = tree_sum(weighted[0], weighted[1]);
  if (row.seen || row.allowed) {
    mask(row, chunk, x);
    out.top[chunk] = top_of(x);
    out.sum[chunk] = sum_of(x, out.top[chunk], per_bit);
    lowest = splat(-INFINITY, lowest);
  } else if (TEMPERED) {
    out.sum[chunk] = tree_sum(tempered[0], tempered[1]);
  }
  out.finite[chunk] = -largest(-lowest) > -INFINITY ? CHUNK : finite_of(x);
}

template <class T> static void summarise(const SampleJob& job, int64_t index, int64_t first, int64_t last, const Summaries& out) {
  if (job.finished && job.finished[index]) return;
  const RowOptions options = options_of(job, index);
  const Row<T> row = Row<T>::of(job, index, options.penalty);
  const float k = per_bit(options.temperature > 0 ? options.temperature : 1.0f);
  if (k != LOG2E)
    for (int64_t chunk = first; chunk < last; ++chunk) summarise_chunk<true>(row, chunk, k, out);
  else
    for (int64_t chunk = first; chunk < last; ++chunk) summarise_chunk<false>(row, chunk, k, out);
}

// Sum over chunks of weight_c 2^t, t = (top_c - top) per_bit, with weight_c = sums_c, or weighted_c + t sums_c.
FA_HD double combined(const float* tops, const float* sums, const float* weighted, int64_t chunks, float top, float per_bit) {
  double lanes[COMBINE_LANES] = {};
  for (int64_t first = 0; first < chunks; first += COMBINE_LANES) {
    for (int i = 0; i < COMBINE_LANES; i += L) {
      const f32x16 d = load16(tops + first + i) - top, t = d * per_bit, f = exp2_of(t), shift = clamped(t);
      for (int j = 0; j < L; ++j) {
        const int64_t c = first + i + j;
        const double weight = weighted ? double(weighted[c]) + double(shift[j]) * double(sums[c]) : double(sums[c]);
        lanes[i + j] += weight * double(f[j]);
      }
    }
  }
  for (int width = COMBINE_LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

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

FA_HD i32x16 kept_lanes(const Keep& keep, f32x16 z) {
  return piecewise([&](auto z) FA_PIECE { return (z > -INFINITY) & (z >= keep.cut) & ((z - keep.top) * keep.per_bit >= keep.least); }, z);
}

// The kept values of a row; `values` has room for V + 16.
template <class T> FA_HD int64_t gather(const Row<T>& row, const Summaries& s, int64_t chunks, const Keep& keep, float* values) {
  int64_t n = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    if (!keeps(keep, s.top[c])) continue;
    f32x16 z[VECTORS];
    load(row, c, z);
    for (int i = 0; i < VECTORS; ++i) n += append(values + n, z[i], kept_lanes(keep, z[i]));
  }
  return n;
}

template <class T>
FA_HD Keep filtered(const Row<T>& row, const RowOptions& o, const Summaries& s, int64_t chunks, float top, float per_bit, double sum, float* values) {
  Keep keep = everything(top, per_bit);
  double total = sum * 1099511627776.0;
  int64_t n = 0;
  if (o.top_k > 0) {
    if (o.top_k <= chunks) {  // that many chunks' largest values are among the row's: a lower bound
      std::copy(s.top, s.top + chunks, values);
      std::nth_element(values, values + o.top_k - 1, values + chunks, [](float a, float b) { return a > b; });
      keep.cut = values[o.top_k - 1];
    }
    n = gather(row, s, chunks, keep, values);
    keep.cut = threshold(values, n, true, o.top_k, top, per_bit);
  }
  if (o.top_p < 1) {
    if (o.top_k == 0) keep.least = top_p_floor(s, chunks, top, per_bit, o.top_p, sum);
    n = gather(row, s, chunks, keep, values);
    if (o.top_k > 0) {
      uint64_t kept = 0;
      for (int64_t i = 0; i < n; ++i) kept += fixed_mass(exp2_of((values[i] - top) * per_bit));
      total = double(kept);
    }
    keep.least = -INFINITY;
    keep.cut = threshold(values, n, false, top_p_target(o, total), top, per_bit);
  }
  if (o.min_p > 0) keep.least = float(log_of(o.min_p) / LN2);
  return keep;
}

// E of 16 consecutive indices.
FA_HD f32x16 exponentials(const Noise& noise, uint32_t first) {
  constexpr u32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return exponential<f32x16>(noise, lane + first);
}

template <class T> static void draw(const SampleJob& job, int64_t index, const Summaries& s, float* scratch) {
  if (job.finished && job.finished[index]) return write_unread(job, index, true);
  const RowOptions o = options_of(job, index);
  const Row<T> row = Row<T>::of(job, index, o.penalty);
  const int64_t chunks = (job.V + CHUNK - 1) / CHUNK;
  Drawn d = {};
  d.top = d.raw_top = -INFINITY;
  for (int64_t c = 0; c < chunks; ++c) {
    d.top = std::max(d.top, s.top[c]);
    d.raw_top = std::max(d.raw_top, s.raw_top[c]);
  }
  const double raw_sum = combined(s.raw_top, s.raw_sum, nullptr, chunks, d.raw_top, LOG2E);
  if (!(raw_sum < INFINITY) || d.top == -INFINITY) return write_unread(job, index, false);
  d.log_raw_sum = log_of(raw_sum);
  d.entropy = entropy_of(d.log_raw_sum, raw_sum, combined(s.raw_top, s.raw_sum, s.raw_weighted, chunks, d.raw_top, LOG2E));
  f32x16 z[VECTORS];
  float flat[CHUNK];
  int64_t winner = 0;
  if (o.temperature == 0) {
    while (s.top[winner] != d.top) ++winner;
    load(row, winner, z);
    memcpy(flat, z, sizeof flat);
    d.token = winner * CHUNK;
    for (int i = 0; flat[i] != d.top; ++i) ++d.token;
    d.kept = 1;
  } else {
    const float k = per_bit(o.temperature);
    d.sum = combined(s.top, s.sum, nullptr, chunks, d.top, k);
    if (!(d.sum < INFINITY)) return write_unread(job, index, false);  // a penalty that leaves no finite logit
    const bool keeps_all = !filters(o);
    const Keep keep = keeps_all ? everything(d.top, k) : filtered(row, o, s, chunks, d.top, k, d.sum, scratch);
    for (int64_t c = 0; c < chunks; ++c) {
      if (keeps_all) {
        d.kept += s.finite[c];
        continue;
      }
      if (!keeps(keep, s.top[c])) {
        s.sum[c] = 0;
        continue;
      }
      load(row, c, z);
      f32x16 sum[2] = {};
      i32x16 kept = {};
#pragma GCC unroll UNROLLED
      for (int i = 0; i < VECTORS; ++i) {
        const i32x16 in = kept_lanes(keep, z[i]);
        sum[i % 2] += chosen(in, exp2_of((z[i] - s.top[c]) * k), f32x16{});
        kept -= in;
      }
      s.sum[c] = tree_sum(sum[0], sum[1]);
      for (int i = 0; i < L; ++i) d.kept += kept[i];
    }
    d.log_sum = log_of(d.sum);
    d.log_kept_sum = keeps_all ? d.log_sum : log_of(combined(s.top, s.sum, nullptr, chunks, d.top, k));
    Lead lead = {INFINITY, NOBODY};
    for (int64_t first = 0; first < chunks; first += L) {
      const f32x16 mass = load16(s.sum + first) * exp2_of((load16(s.top + first) - d.top) * k);
      const f32x16 score = exponentials(o.noise, CHUNK_TAG | uint32_t(first)) / mass;
      for (int i = 0; i < L; ++i)
        if (mass[i] > 0 && leads({score[i], uint32_t(first + i)}, lead)) lead = {score[i], uint32_t(first + i)};
    }
    if (lead.index == NOBODY) return write_unread(job, index, false);
    winner = lead.index;
    lead = {INFINITY, NOBODY};
    load(row, winner, z);
    memcpy(flat, z, sizeof flat);
    for (int i = 0; i < VECTORS; ++i) {
      const f32x16 mass = exp2_of((z[i] - s.top[winner]) * k);
      const uint32_t first = uint32_t(winner * CHUNK + i * L);
      const f32x16 score = exponentials(o.noise, first) / mass;
      for (int j = 0; j < L; ++j)
        if (mass[j] > 0 && keeps(keep, z[i][j]) && leads({score[j], first + j}, lead)) lead = {score[j], first + j};
    }
    if (lead.index == NOBODY) return write_unread(job, index, false);
    d.token = lead.index;
  }
  d.z = flat[d.token - winner * CHUNK];
  load_raw(row, winner, z);
  memcpy(flat, z, sizeof flat);
  d.x = flat[d.token - winner * CHUNK];
  write_draw(job, index, o.temperature, d);
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
