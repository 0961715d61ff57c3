// The thresholds of a row's filters: in the list that its blocks collected, or by one block that goes over the row.
#pragma once

#include "block_search.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

constexpr int BINS = 1024;

struct FilterShared : ListShared {
  union {
    SplitSum masses[BINS];
    uint16_t open[MAX_CHUNKS];  // of this block's share: chunks with several values between the edges, in any order
  };
  float values[CANDIDATES];  // in any order
  uint32_t candidates;       // how many there are, also if they do not fit
  uint32_t open_chunks;
  uint32_t low, high, slot, open_slot;
  uint64_t above;
};

// What a threshold is asked for: the lowest value for which the values above it have less mass than `target`.
struct Search {
  bool unit;  // every value has mass 1 (top_k), not its probability (top_p)
  double target;
  uint64_t above;           // mass of values that are not at hand, all of them above the threshold
  uint32_t low_key, high_key;  // between which the threshold lies
};
FA_HD uint64_t mass_of(const Search& search, const Keep& keep, float z) {
  return search.unit ? 1 : fixed_mass(exp2_of((z - keep.top) * keep.per_bit));
}

// Where the values of a threshold lie.
enum Source { SHARED_VALUES, SURVIVORS };

// Calls f(t, z) for each kept value z of the source, t being the thread that holds it. The order does not matter.
template <class T, class F>
FA_HD void for_values(FilterShared& shared, Source source, const BlockRow<T>& row, const ChunkSummary* s, const Keep& keep, F f) {
  if (source == SHARED_VALUES) {
    FA_THREADS(t) {
      for (uint32_t i = t; i < shared.candidates; i += THREADS)
        if (keeps(keep, shared.values[i])) f(t, shared.values[i]);
    }
    return;
  }
  FA_WARPS(w) {
    for_chunks_of_warp(row, s, shared.survivors, int(shared.chunks), w, [&](int, float, PerThread<float[PER_LANE]>& z) {
      FA_LANES(w, t) {
        uint32_t in = 0;
        FA_UNROLL
        for (int j = 0; j < PER_LANE; ++j) in |= uint32_t(keeps(keep, z[t][j])) << j;
        FA_ONE_COPY
        for (; in; in &= in - 1) f(t, value_at(z[t], lowest_bit(in)));
      }
    });
  }
}

// As `threshold` in threshold.h. Here the range of keys narrows and the values stay in place. The result lies at or below the lowest kept value and
// above every dropped one, so as a cut it is the same.
template <class T>
FA_HD float block_threshold(FilterShared& shared, Source source, const BlockRow<T>& row, const ChunkSummary* s, const Keep& keep, const Search& search) {
  FA_THREADS(t) {
    if (t == 0) {
      shared.low = search.low_key;
      shared.high = search.high_key;
      shared.above = search.above;
    }
  }
  barrier();
  while (shared.low != shared.high) {
    const uint32_t low = shared.low, high = shared.high;
    int shift = 0;
    while ((high - low) >> shift >= BINS) ++shift;
    barrier();  // every thread has read the range before thread 0 writes it
    FA_THREADS(t) {
      for (int b = t; b < BINS; b += THREADS) shared.masses[b] = {0, 0};
    }
    barrier();
    for_values(shared, source, row, s, keep, [&](int, float z) {
      const uint32_t key = key_of(z);
      if (key >= low && key <= high) atomic_add(&shared.masses[(key - low) >> shift], mass_of(search, keep, z));
    });
    barrier();
    constexpr int PART = BINS / THREADS;
    const uint64_t above = shared.above;
    PerThread<uint64_t> part;
    FA_THREADS(t) {
      part[t] = 0;
      for (int b = 0; b < PART; ++b) part[t] += value_of(shared.masses[t * PART + b]);
    }
    PerThread<uint64_t> behind_part = part;
    sum_behind(behind_part, shared.totals);
    FA_THREADS(t) {
      uint64_t behind = above + behind_part[t];
      // The lowest bin takes a target that is not reached.
      if (double(behind) < search.target && (double(behind + part[t]) >= search.target || t == 0)) {
        int bin = t * PART + PART - 1;
        while (bin > t * PART && double(behind + value_of(shared.masses[bin])) < search.target) behind += value_of(shared.masses[bin--]);
        shared.above = behind;
        const uint32_t first = low + (uint32_t(bin) << shift), end = first + ((1u << shift) - 1);
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

// The mass of the kept values of the source.
template <class T>
FA_HD uint64_t total_mass(FilterShared& shared, Source source, const BlockRow<T>& row, const ChunkSummary* s, const Keep& keep, const Search& search) {
  PerThread<uint64_t> sum;
  FA_THREADS(t) { sum[t] = 0; }
  for_values(shared, source, row, s, keep, [&](int t, float z) { sum[t] += mass_of(search, keep, z); });
  FA_THREADS(t) { shared.totals[t] = sum[t]; }
  return over_block(shared.totals, [](uint64_t a, uint64_t b) { return a + b; });
}

// The threshold among the kept values of shared.values: whether it is there, and `cut`.
template <class T>
FA_HD bool list_threshold(FilterShared& shared, const BlockRow<T>& row, const ChunkSummary* s, const Keep& keep, const Search& search, float& cut) {
  const int n = int(shared.candidates);
  if (n > THREADS) {
    const double total = double(search.above + total_mass(shared, SHARED_VALUES, row, s, keep, search));
    if (!(double(search.above) < search.target && total >= search.target)) return false;
    cut = block_threshold(shared, SHARED_VALUES, row, s, keep, search);
    return true;
  }
  FA_THREADS(t) {  // few values: a thread a value, which sums the mass above its value
    const float z = t < n ? shared.values[t] : -INFINITY;
    shared.totals[t] = keeps(keep, z) ? mass_of(search, keep, z) : 0;
    if (t == 0) shared.low = NO_KEY;
  }
  barrier();
  FA_THREADS(t) {
    const float z = shared.values[t];
    uint64_t above = search.above, whole = search.above;
    for (int i = 0; i < n; ++i) {
      const uint64_t mass = shared.totals[i];
      whole += mass;
      above += shared.values[i] > z ? mass : 0;
    }
    if (shared.totals[t] > 0 && double(above) < search.target && double(whole) >= search.target) lower_to(&shared.low, key_of(z));
  }
  barrier();
  const uint32_t low = shared.low;
  barrier();
  cut = logit_of(low);
  return low != NO_KEY;
}

// Lists the kept values of a row in shared memory if they fit.
template <class T>
FA_HD Source collect_row(FilterShared& shared, const BlockRow<T>& row, ChunkSummary* s, int chunks, const Keep& keep) {
  list_survivors<false>(shared, s, 0, chunks, keep);
  FA_THREADS(t) {
    if (t == 0) shared.candidates = 0;
  }
  barrier();
  for_values(shared, SURVIVORS, row, s, keep, [&](int, float z) {
    const uint32_t slot = take_slot(&shared.candidates);
    if (slot < CANDIDATES) shared.values[slot] = z;
  });
  barrier();
  return shared.candidates <= CANDIDATES ? SHARED_VALUES : SURVIVORS;
}

// The cut of a row whose list does not tell: one block goes over the row, several times. Correct for every row, and slow. It reads options where it
// needs them, for registers.
template <class T>
FA_HD float cut_by_one_block(FilterShared& shared, const BlockRow<T>& row, const SampleJob& job, int64_t index, ChunkSummary* s, const RowState& known) {
  const int chunks = (row.V + CHUNK - 1) / CHUNK;
  Keep keep = everything(known.drawn.top, known.per_bit);
  Search search = {true, double(top_k_target(options_of(job, index), known.finite)), 0, key_of(-INFINITY), key_of(INFINITY)};
  const Source source = collect_row(shared, row, s, chunks, keep);
  FA_ONE_COPY
  for (search.unit = options_of(job, index).top_k > 0;; search.unit = false) {
    if (!search.unit) {
      const bool cut_by_top_k = keep.cut > -INFINITY;
      const double total = cut_by_top_k ? double(total_mass(shared, source, row, s, keep, search)) : known.drawn.sum * 0x1p40;
      search.target = top_p_target(options_of(job, index), total);
    }
    keep.cut = block_threshold(shared, source, row, s, keep, search);
    if (!search.unit || options_of(job, index).top_p >= 1) return keep.cut;
  }
}

// Reads the values between a row's edges, as many as its list holds, and its open chunks. It asks for the first ones before it knows how many
// there are, so that they come with the state.
FA_HD void read_lists(FilterShared& shared, RowMemory* memory, const RowState& known) {
  FA_THREADS(t) {
    shared.values[t] = fresh(memory->list + t);
    shared.survivors[t] = uint16_t(fresh(memory->histogram + t));
    FA_ONE_COPY
    for (uint32_t i = t + THREADS; i < known.inside && i < CANDIDATES; i += THREADS) shared.values[i] = fresh(memory->list + i);
    FA_ONE_COPY
    for (uint32_t i = t + THREADS; i < known.open_chunks; i += THREADS) shared.survivors[i] = uint16_t(fresh(memory->histogram + i));
    if (t == 0) {
      shared.candidates = known.inside;
      shared.chunks = known.open_chunks;
      shared.kept = known.kept;
    }
  }
  barrier();
}

// The cut of a row, given the list of values between its edges: whether the list tells.
template <class T>
FA_HD bool cut_by_list(FilterShared& shared, const BlockRow<T>& row, const RowOptions& o, const ChunkSummary* s, const RowState& known, float& cut) {
  Keep keep = everything(known.drawn.top, known.per_bit);
  const bool both = o.top_k > 0 && o.top_p < 1;
  Search search = {o.top_k > 0, double(top_k_target(o, known.finite)), known.above, known.low_key, known.high_key};
  if (o.top_k == 0) {
    search.target = top_p_target(o, known.drawn.sum * 0x1p40);
    search.above = known.mass_above;
  }
  if (known.inside > CANDIDATES) {  // ties alone need no list
    cut = logit_of(known.low_key);
    const double with = double(search.above + known.inside * mass_of(search, keep, cut));
    return known.low_key == known.high_key && !both && double(search.above) < search.target && with >= search.target;
  }
  FA_ONE_COPY
  while (true) {
    if (!list_threshold(shared, row, s, keep, search, cut)) return false;
    if (!search.unit || !both) return true;
    keep.cut = cut;  // the list holds all that top_k keeps
    search.unit = false;
    search.target = top_p_target(o, double(total_mass(shared, SHARED_VALUES, row, s, keep, search)));
  }
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
