// The sampler on a CPU, one row at a time. One read writes the summaries of chunks; filters and the race then read what the summaries leave.
//
// The summaries bound which chunks can hold a kept id. On a peaked softmax the second part reads a few chunks. On a flat softmax it reads the
// row two or three times from the L2 cache. Thresholds come from histograms of whole numbers, never from a sort.
#pragma once

#include <algorithm>

#include "threshold.h"

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
  // As in softmax/rows.h: the hardware prefetcher stops at every 4 KiB page.
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
