// The sampler as a block of 256 threads runs it. It computes what rows.h computes with vectors: the same sums in the same order.
//
// Blocks share a row's chunks. The block that finishes last finds all summaries and draws. If a filter's candidates fit in shared memory, the
// rest of the draw reads a few chunks. Otherwise the rounds of its histogram read the row, which the L2 cache holds.
#pragma once

#include "block_filters.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

// Summaries of chunks [first, last) of a row, a warp a chunk; lane l holds ids l, l + 32, ... of it.
template <class T> FA_HD void summarise_chunks(const SampleJob& job, int64_t index, int64_t first, int64_t last, const Summaries& out) {
  const RowOptions options = options_of(job, index);
  const BlockRow<T> row = block_row<T>(job, index, options.penalty);
  const float k = per_bit(options.temperature > 0 ? options.temperature : 1.0f);
  const bool masked = row.seen || row.allowed, tempered = masked || k != LOG2E;
  constexpr int PER_LANE = CHUNK / CHUNK_LANES;
  for (int64_t base = first; base < last; base += WARPS) {
    PerThread<float[PER_LANE]> x, z;
    PerThread<float> raw_top, top, raw_sum, raw_weighted, sum;
    PerThread<int32_t> finite;
    FA_THREADS(t) {
      const int64_t chunk = base + t / WARP, id = chunk * CHUNK + t % WARP;
      // A loop of loads alone: next to arithmetic, nvcc waits for each load before it issues the next.
      for (int j = 0; j < PER_LANE; ++j) x[t][j] = chunk < last ? raw_logit(row, id + j * CHUNK_LANES) : -INFINITY;
      for (int j = 0; j < PER_LANE; ++j) z[t][j] = x[t][j];
      if (masked && chunk < last)
        for (int j = 0; j < PER_LANE; ++j) z[t][j] = masked_logit(row, id + j * CHUNK_LANES, x[t][j]);
      raw_top[t] = top[t] = -INFINITY;
      finite[t] = 0;
      for (int j = 0; j < PER_LANE; ++j) {
        raw_top[t] = larger_of(raw_top[t], x[t][j]);
        top[t] = larger_of(top[t], z[t][j]);
        finite[t] += z[t][j] > -INFINITY;
      }
    }
    const auto larger = [](float a, float b) { return larger_of(a, b); };
    const auto plus = [](float a, float b) { return a + b; };
    over_warps(raw_top, larger);
    over_warps(top, larger);
    FA_THREADS(t) {
      raw_sum[t] = raw_weighted[t] = sum[t] = 0;
      for (int j = 0; j < PER_LANE; ++j) {
        const float bits = (x[t][j] - finite_reference(raw_top[t])) * LOG2E, e = exp2_of(bits);
        raw_sum[t] += e;
        raw_weighted[t] = fused(clamped(bits), e, raw_weighted[t]);
      }
      if (tempered)
        for (int j = 0; j < PER_LANE; ++j) sum[t] += exp2_of((z[t][j] - finite_reference(top[t])) * k);
    }
    over_warps(raw_sum, plus);
    over_warps(raw_weighted, plus);
    over_warps(sum, plus);
    over_warps(finite, [](int32_t a, int32_t b) { return a + b; });
    FA_THREADS(t) {
      const int64_t chunk = base + t / WARP;
      if (t % WARP == 0 && chunk < last) {
        out.raw_top[chunk] = raw_top[t];
        out.raw_sum[chunk] = raw_sum[t];
        out.raw_weighted[chunk] = raw_weighted[t];
        out.top[chunk] = top[t];
        out.sum[chunk] = tempered ? sum[t] : raw_sum[t];
        out.finite[chunk] = finite[t];
      }
    }
  }
}

// As `combined` in rows.h.
FA_HD double combine(Shared& shared, const float* tops, const float* sums, const float* weighted, int64_t chunks, float top, float k) {
  FA_THREADS(t) {
    double sum = 0;
    for (int64_t c = t; c < chunks; c += THREADS) {
      const float bits = (fresh(tops + c) - top) * k;
      const double chunk_sum = double(fresh(sums + c));
      sum += (weighted ? double(fresh(weighted + c)) + double(clamped(bits)) * chunk_sum : chunk_sum) * double(exp2_of(bits));
    }
    shared.sums[t] = sum;
  }
  return over_block(shared.sums, [](double a, double b) { return a + b; });
}

// The winner of a race whose entries are in shared.leads, or NOBODY.
FA_HD uint32_t won(Shared& shared) {
  return over_block(shared.leads, [](const Lead& a, const Lead& b) { return leads(b, a) ? b : a; }).index;
}

// The largest of the chunks' largest values.
FA_HD float top_of_row(Shared& shared, const float* tops, int64_t chunks) {
  FA_THREADS(t) {
    float top = -INFINITY;
    for (int64_t c = t; c < chunks; c += THREADS) top = larger_of(top, fresh(tops + c));
    shared.tops[t] = top;
  }
  return over_block(shared.tops, [](float a, float b) { return larger_of(a, b); });
}

FA_HD void write_invalid(const SampleJob& job, int64_t index) {
  FA_THREADS(t) {
    if (t == 0) write_unread(job, index, false);
  }
}

// Writes the sum of each chunk's kept values to s.sum and returns how many values are kept.
template <class T> FA_HD int64_t keep_chunks(Shared& shared, const BlockRow<T>& row, const Summaries& s, int64_t chunks, const Keep& keep) {
  list_survivors(shared, s, chunks, keep, s.sum);
  PerThread<uint32_t> count;
  FA_THREADS(t) { count[t] = 0; }
  for (uint32_t base = 0; base < shared.chunks; base += WARPS) {
    PerThread<float> sum;
    FA_THREADS(t) {
      const uint32_t i = base + t / WARP;
      sum[t] = 0;
      if (i < shared.chunks) {
        const int64_t c = shared.survivors[i], id = c * CHUNK + t % WARP;
        const float top = fresh(s.top + c);
        float z[CHUNK / CHUNK_LANES];
        for (int j = 0; j < CHUNK / CHUNK_LANES; ++j) z[j] = raw_logit(row, id + j * CHUNK_LANES);
        for (int j = 0; j < CHUNK / CHUNK_LANES; ++j) z[j] = masked_logit(row, id + j * CHUNK_LANES, z[j]);
        for (int j = 0; j < CHUNK / CHUNK_LANES; ++j) {
          const bool in = keeps(keep, z[j]);
          sum[t] += in ? exp2_of((z[j] - top) * keep.per_bit) : 0.0f;
          count[t] += in;
        }
      }
    }
    over_warps(sum, [](float a, float b) { return a + b; });
    FA_THREADS(t) {
      if (t % WARP == 0 && base + t / WARP < shared.chunks) s.sum[shared.survivors[base + t / WARP]] = sum[t];
    }
  }
  FA_THREADS(t) { shared.counts[t] = count[t]; }
  return over_block(shared.counts, [](uint32_t a, uint32_t b) { return a + b; });
}

// The draw of a row whose summaries are complete.
template <class T> FA_HD void draw_row(Shared& shared, const SampleJob& job, int64_t index, const Summaries& s) {
  const RowOptions o = options_of(job, index);
  const BlockRow<T> row = block_row<T>(job, index, o.penalty);
  const int64_t chunks = (job.V + CHUNK - 1) / CHUNK;
  Drawn d = {};
  d.top = top_of_row(shared, s.top, chunks);
  d.raw_top = top_of_row(shared, s.raw_top, chunks);
  d.raw_sum = combine(shared, s.raw_top, s.raw_sum, nullptr, chunks, d.raw_top, LOG2E);
  if (!(d.raw_sum < INFINITY) || d.top == -INFINITY) return write_invalid(job, index);
  d.raw_weighted = combine(shared, s.raw_top, s.raw_sum, s.raw_weighted, chunks, d.raw_top, LOG2E);
  uint32_t token;
  if (o.temperature == 0) {  // a race of the ids with the largest logit; the lowest id wins
    FA_THREADS(t) {
      shared.leads[t] = {INFINITY, NOBODY};
      for (int64_t c = t; c < chunks; c += THREADS)
        if (fresh(s.top + c) == d.top && leads({0.0f, uint32_t(c)}, shared.leads[t])) shared.leads[t] = {0.0f, uint32_t(c)};
    }
    const uint32_t chunk = won(shared);
    FA_THREADS(t) {
      const uint32_t id = chunk * CHUNK + t;
      shared.leads[t] = logit(row, id) == d.top ? Lead{0.0f, id} : Lead{INFINITY, NOBODY};
    }
    token = won(shared);
    d.sum = d.kept_sum = d.kept = 1;
  } else {
    const float k = per_bit(o.temperature);
    d.sum = d.kept_sum = combine(shared, s.top, s.sum, nullptr, chunks, d.top, k);
    if (!(d.sum < INFINITY)) return write_invalid(job, index);
    Keep keep = everything(d.top, k);
    if (filters(o)) {
      keep = block_filtered(shared, row, o, s, chunks, d.top, k, d.sum);
      d.kept = keep_chunks(shared, row, s, chunks, keep);
      d.kept_sum = combine(shared, s.top, s.sum, nullptr, chunks, d.top, k);
    } else {
      FA_THREADS(t) {
        shared.counts[t] = 0;
        for (int64_t c = t; c < chunks; c += THREADS) shared.counts[t] += uint32_t(fresh(s.finite + c));
      }
      d.kept = over_block(shared.counts, [](uint32_t a, uint32_t b) { return a + b; });
    }
    FA_THREADS(t) {
      shared.leads[t] = {INFINITY, NOBODY};
      for (int64_t c = t; c < chunks; c += THREADS) {
        const float mass = fresh(s.sum + c) * exp2_of((fresh(s.top + c) - d.top) * k);
        const Lead entry = {exponential<float>(o.noise, CHUNK_TAG | uint32_t(c)) / mass, uint32_t(c)};
        if (mass > 0 && leads(entry, shared.leads[t])) shared.leads[t] = entry;
      }
    }
    const uint32_t chunk = won(shared);
    if (chunk == NOBODY) return write_invalid(job, index);  // options out of range, which a GPU does not check by default
    FA_THREADS(t) {
      const uint32_t id = chunk * CHUNK + t;
      const float z = logit(row, id), mass = exp2_of((z - fresh(s.top + chunk)) * k);
      shared.leads[t] = mass > 0 && keeps(keep, z) ? Lead{exponential<float>(o.noise, id) / mass, id} : Lead{INFINITY, NOBODY};
    }
    token = won(shared);
  }
  if (token == NOBODY) return write_invalid(job, index);
  d.token = token;
  d.z = logit(row, token);
  d.x = raw_logit(row, token);
  FA_THREADS(t) {
    if (t == 0) write_drawn(job, index, d, o.temperature);
  }
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
