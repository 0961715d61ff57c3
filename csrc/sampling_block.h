// The sampler as a block of 256 threads runs it: what sampling_rows.h does with vectors, with the same sums in the same order.
//
// Blocks share a row's chunks; the last one to finish its part finds all summaries and draws. Where a filter's candidates fit shared
// memory the rest of the draw reads a few chunks; else the rounds of its histogram go over the row, which the L2 cache holds.
#pragma once

#include "lockstep.h"
#include "sampling_api.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

constexpr int BUCKETS = 1024, CANDIDATES = 2048;

// What a block's threads share: 27 KiB, so that three blocks fit a multiprocessor with 100.
struct Shared {
  union {  // lanes of `over_block`, one kind at a time
    double sums[THREADS];
    float tops[THREADS];
    uint64_t totals[THREADS];
    uint32_t counts[THREADS];
    Lead leads[THREADS];
  };
  SplitSum masses[BUCKETS];
  uint64_t part_masses[THREADS], group_masses[WARP];
  float values[CANDIDATES];      // candidates of a filter
  uint16_t survivors[MAX_CHUNKS]; // chunks that hold some, in no order that matters
  uint32_t candidates, chunks, low, high;
  uint64_t above;
};

FA_HD float widened(float x) { return x; }
FA_HD float widened(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
FA_HD float widened(fp16 x) {  // see dtypes.h
  const uint32_t moved = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(moved) * 0x1p112f);
  return bit_cast<float>((moved >= 0x0f800000u ? moved | 0x7f800000u : finite) | uint32_t(x.bits & 0x8000) << 16);
}

template <class T> struct BlockRow {
  const T* x;
  int64_t V;
  const int32_t *seen, *allowed;
  float penalty;
};
template <class T> FA_HD BlockRow<T> block_row(const SampleJob& job, int64_t index, float penalty) {
  const int64_t words = (job.V + 31) / 32;
  return {static_cast<const T*>(job.logits) + index * job.row_stride, job.V, job.seen && penalty != 1 ? job.seen + index * words : nullptr,
          job.allowed ? job.allowed + index * words : nullptr, penalty};
}
template <class T> FA_HD float raw_logit(const BlockRow<T>& row, int64_t id) { return id < row.V ? widened(row.x[id]) : -INFINITY; }
template <class T> FA_HD float masked_logit(const BlockRow<T>& row, int64_t id, float x) {
  if (id >= row.V) return x;
  if (row.seen && uint32_t(row.seen[id / 32]) >> (id % 32) & 1) x = penalised(x, row.penalty);
  if (row.allowed && !(uint32_t(row.allowed[id / 32]) >> (id % 32) & 1)) x = -INFINITY;
  return x;
}
template <class T> FA_HD float logit(const BlockRow<T>& row, int64_t id) { return masked_logit(row, id, raw_logit(row, id)); }

FA_HD float larger_of(float a, float b) { return b > a ? b : a; }  // NaN in b is passed over
FA_HD float finite_reference(float top) { return top == -INFINITY ? 0.0f : top; }

// Summaries of chunks [first, last) of a row, a warp a chunk; lane l holds ids l, l + 32, ... of it.
template <class T> FA_HD void summarise_chunks(const SampleJob& job, int64_t index, int64_t first, int64_t last, const Summaries& out) {
  const RowOptions options = options_of(job, index);
  const BlockRow<T> row = block_row<T>(job, index, options.penalty);
  const float k = per_bit(options.temperature > 0 ? options.temperature : 1.0f);
  const bool masked = row.seen || row.allowed, tempered = masked || k != LOG2E;
  constexpr int OWN = CHUNK / CHUNK_LANES;
  for (int64_t base = first; base < last; base += WARPS) {
    PerThread<float[OWN]> x, z;
    PerThread<float> raw_top, top, raw_sum, raw_weighted, sum;
    PerThread<int32_t> finite;
    FA_THREADS(t) {
      const int64_t chunk = base + t / WARP, id = chunk * CHUNK + t % WARP;
      // Loads alone in a loop of their own: beside arithmetic, nvcc waits for each before it asks for the next.
      for (int j = 0; j < OWN; ++j) x[t][j] = chunk < last ? raw_logit(row, id + j * CHUNK_LANES) : -INFINITY;
      for (int j = 0; j < OWN; ++j) z[t][j] = x[t][j];
      if (masked && chunk < last)
        for (int j = 0; j < OWN; ++j) z[t][j] = masked_logit(row, id + j * CHUNK_LANES, x[t][j]);
      raw_top[t] = top[t] = -INFINITY;
      finite[t] = 0;
      for (int j = 0; j < OWN; ++j) {
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
      for (int j = 0; j < OWN; ++j) {
        const float bits = (x[t][j] - finite_reference(raw_top[t])) * LOG2E, e = exp2_of(bits);
        raw_sum[t] += e;
        raw_weighted[t] = fused(clamped(bits), e, raw_weighted[t]);
      }
      if (tempered)
        for (int j = 0; j < OWN; ++j) sum[t] += exp2_of((z[t][j] - finite_reference(top[t])) * k);
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

// See `combined` in sampling_rows.h.
FA_HD double combine(Shared& shared, const float* tops, const float* sums, const float* weighted, int64_t chunks, float top, float k) {
  FA_THREADS(t) {
    double sum = 0;
    for (int64_t c = t; c < chunks; c += THREADS) {
      const float bits = (fresh(tops + c) - top) * k;
      const double own = double(fresh(sums + c));
      sum += (weighted ? double(fresh(weighted + c)) + double(clamped(bits)) * own : own) * double(exp2_of(bits));
    }
    shared.sums[t] = sum;
  }
  return over_block(shared.sums, [](double a, double b) { return a + b; });
}

// Lists the chunks that hold a kept value; `zeroed`, where given, gets a 0 for each chunk.
FA_HD void list_survivors(Shared& shared, const Summaries& s, int64_t chunks, const Keep& keep, float* zeroed) {
  FA_THREADS(t) {
    if (t == 0) shared.chunks = 0;
  }
  barrier();
  FA_THREADS(t) {
    for (int64_t c = t; c < chunks; c += THREADS) {
      if (keeps(keep, fresh(s.top + c))) shared.survivors[take_slot(&shared.chunks)] = uint16_t(c);
      if (zeroed) zeroed[c] = 0;
    }
  }
  barrier();
}

// Where the values of a threshold lie.
enum Source { CHUNK_TOPS, SHARED_VALUES, SURVIVORS };

// f(t, z) for every value of the source, t being the thread that has it, that `keep` keeps, in no order that matters.
template <class T, class F>
FA_HD void for_values(Shared& shared, Source source, const BlockRow<T>& row, const Summaries& s, int64_t chunks, const Keep& keep, F f) {
  FA_THREADS(t) {
    if (source == CHUNK_TOPS) {
      for (int64_t c = t; c < chunks; c += THREADS)
        if (keeps(keep, fresh(s.top + c))) f(t, fresh(s.top + c));
    } else if (source == SHARED_VALUES) {
      for (uint32_t i = t; i < shared.candidates; i += THREADS)
        if (keeps(keep, shared.values[i])) f(t, shared.values[i]);
    } else {
      for (uint32_t i = t / WARP; i < shared.chunks; i += WARPS) {
        const int64_t id = int64_t(shared.survivors[i]) * CHUNK + t % WARP;
        float z[CHUNK / CHUNK_LANES];
        for (int j = 0; j < CHUNK / CHUNK_LANES; ++j) z[j] = raw_logit(row, id + j * CHUNK_LANES);
        for (int j = 0; j < CHUNK / CHUNK_LANES; ++j) z[j] = masked_logit(row, id + j * CHUNK_LANES, z[j]);
        for (int j = 0; j < CHUNK / CHUNK_LANES; ++j)
          if (keeps(keep, z[j])) f(t, z[j]);
      }
    }
  }
}

// See `threshold` in sampling_rows.h. Here the range of keys narrows and values stay where they are; the result lies at or below the
// lowest kept value and above all others, which as a cut is the same.
template <class T>
FA_HD float block_threshold(Shared& shared, Source source, const BlockRow<T>& row, const Summaries& s, int64_t chunks, const Keep& keep, bool unit, double target) {
  FA_THREADS(t) {
    if (t == 0) {
      // No kept value lies below: `least` is met from top + least / per_bit on, but for roundings.
      shared.low = key_of(larger_of(keep.cut, keep.top + 1.01f * keep.least / keep.per_bit));
      shared.high = key_of(keep.top);
      shared.above = 0;
    }
  }
  barrier();
  while (shared.low != shared.high) {
    const uint32_t low = shared.low, high = shared.high;
    int shift = 0;
    while ((high - low) >> shift >= BUCKETS) ++shift;
    barrier();  // before thread 0 writes the range, all have read it
    FA_THREADS(t) {
      for (int b = t; b < BUCKETS; b += THREADS) shared.masses[b] = {0, 0};
    }
    barrier();
    for_values(shared, source, row, s, chunks, keep, [&](int, float z) {
      const uint32_t key = key_of(z);
      if (key >= low && key <= high) atomic_add(&shared.masses[(key - low) >> shift], unit ? 1 : fixed_mass(exp2_of((z - keep.top) * keep.per_bit)));
    });
    barrier();
    constexpr int PART = BUCKETS / THREADS, GROUP = THREADS / WARP;
    FA_THREADS(t) {
      uint64_t sum = 0;
      for (int b = 0; b < PART; ++b) sum += value_of(shared.masses[t * PART + b]);
      shared.part_masses[t] = sum;
    }
    barrier();
    FA_THREADS(t) {
      if (t < WARP) {
        uint64_t sum = 0;
        for (int p = 0; p < GROUP; ++p) sum += shared.part_masses[t * GROUP + p];
        shared.group_masses[t] = sum;
      }
    }
    barrier();
    FA_THREADS(t) {
      if (t == 0) {  // from the top down: groups, then parts of one, then its buckets
        uint64_t above = shared.above;
        int group = WARP - 1;
        while (group > 0 && double(above + shared.group_masses[group]) < target) above += shared.group_masses[group--];
        int part = group * GROUP + GROUP - 1;
        while (part > group * GROUP && double(above + shared.part_masses[part]) < target) above += shared.part_masses[part--];
        int bucket = part * PART + PART - 1;
        while (bucket > part * PART && double(above + value_of(shared.masses[bucket])) < target) above += value_of(shared.masses[bucket--]);
        shared.above = above;
        const uint32_t first = low + (uint32_t(bucket) << shift), end = first + ((1u << shift) - 1);
        shared.low = first;
        shared.high = end < high ? end : high;
      }
    }
    barrier();
  }
  const float cut = logit_of(shared.low);
  barrier();
  return cut;
}

// Lists the kept values in shared memory where they fit.
template <class T> FA_HD Source collect(Shared& shared, const BlockRow<T>& row, const Summaries& s, int64_t chunks, const Keep& keep) {
  list_survivors(shared, s, chunks, keep, nullptr);
  FA_THREADS(t) {
    if (t == 0) shared.candidates = 0;
  }
  barrier();
  for_values(shared, SURVIVORS, row, s, chunks, keep, [&](int, float z) {
    const uint32_t slot = take_slot(&shared.candidates);
    if (slot < CANDIDATES) shared.values[slot] = z;
  });
  barrier();
  return shared.candidates <= CANDIDATES ? SHARED_VALUES : SURVIVORS;
}

// A lower bound of `per_bit (z - top)` under top_p alone: V values of that size together hold no more than 1 - top_p of the mass.
FA_HD float simple_floor(int64_t V, double top_p, double sum) {
  const double budget = sum * ((1.0 - top_p) * 0.999 - 4e-6);
  return budget > 0 ? float(log_of(budget / double(V)) / LN2) - 0.01f : -INFINITY;
}

template <class T>
FA_HD Keep block_filtered(Shared& shared, const BlockRow<T>& row, const RowOptions& o, const Summaries& s, int64_t chunks, float top, float k, double sum) {
  Keep keep = everything(top, k);
  Source source = SURVIVORS;
  double total = sum * 1099511627776.0;
  if (o.top_k > 0) {
    if (o.top_k <= chunks) keep.cut = block_threshold(shared, CHUNK_TOPS, row, s, chunks, keep, true, o.top_k);
    source = collect(shared, row, s, chunks, keep);
    keep.cut = block_threshold(shared, source, row, s, chunks, keep, true, o.top_k);
  }
  if (o.top_p < 1) {
    if (o.top_k > 0) {
      FA_THREADS(t) { shared.totals[t] = 0; }
      barrier();
      for_values(shared, source, row, s, chunks, keep, [&](int t, float z) { shared.totals[t] += fixed_mass(exp2_of((z - top) * k)); });
      total = double(over_block(shared.totals, [](uint64_t a, uint64_t b) { return a + b; }));
    } else {
      const float floor = simple_floor(row.V, o.top_p, sum);
      keep.least = floor < 0 ? floor : -INFINITY;
      source = collect(shared, row, s, chunks, keep);
    }
    keep.cut = block_threshold(shared, source, row, s, chunks, keep, false, top_p_target(o, total));
    keep.least = -INFINITY;
  }
  if (o.min_p > 0) keep.least = float(log_of(o.min_p) / LN2);
  return keep;
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

// Sums and counts what `keep` keeps of each chunk into s.sum; returns the count.
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
  if (o.temperature == 0) {  // a race of ids with the largest logit, in which the lowest wins
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
        const Lead own = {exponential<float>(o.noise, CHUNK_TAG | uint32_t(c)) / mass, uint32_t(c)};
        if (mass > 0 && leads(own, shared.leads[t])) shared.leads[t] = own;
      }
    }
    const uint32_t chunk = won(shared);
    if (chunk == NOBODY) return write_invalid(job, index);  // options beyond their range, which a GPU does not check unasked
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
