// The filters of a row, by a block of threads: which values top_k, top_p and min_p keep.
#pragma once

#include "block_row.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

// Lists the chunks that hold a kept value. If `zeroed` is given, it gets a 0 for each chunk.
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

// Calls f(t, z) for each kept value z of the source, t being the thread that holds it. The order does not matter.
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

// As `threshold` in rows.h. Here the range of keys narrows and the values stay in place. The result lies at or below the lowest kept value and
// above every dropped one, so as a cut it is the same.
template <class T>
FA_HD float block_threshold(Shared& shared, Source source, const BlockRow<T>& row, const Summaries& s, int64_t chunks, const Keep& keep, bool unit,
                            double target) {
  FA_THREADS(t) {
    if (t == 0) {
      // No kept value lies below: `least` is met from top + least / per_bit on, up to rounding.
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
    barrier();  // every thread has read the range before thread 0 writes it
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

// Lists the kept values in shared memory if they fit.
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
FA_HD Keep block_filtered(Shared& shared, const BlockRow<T>& row, const RowOptions& o, const Summaries& s, int64_t chunks, float top, float k,
                          double sum) {
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

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
