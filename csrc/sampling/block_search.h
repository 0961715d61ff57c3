// How blocks that share a row find the threshold of top_k or top_p: the launches and what they leave each other.
//
//   1. summarise   the last block of a row knows its largest value, the range that the threshold lies in, and the sums (block.h)
//   2. count       all blocks count values in BUCKETS equal parts of that range. The last block bounds the mass of each part by its count and
//                  its edges, and so finds the few parts that can hold the threshold.
//   3. collect     all blocks sum the mass above those parts, exactly, and list the values in them. The last block finds the threshold in the
//                  list and draws (block_filters.h).
//
// Only the third launch decides, from sums of whole numbers. A range or parts that miss the threshold cost time alone: the last block sees
// it and goes over the row by itself.
#pragma once

#include "block_row.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

constexpr int BUCKETS = 4096, CANDIDATES = 4096;

// A row between two launches.
struct RowState {
  enum Step { DRAWN, SEARCH, KEEP } step;  // KEEP: the threshold is known to be at most the row's smallest value, or at its only value
  Drawn drawn;                             // top, raw_top, sum, raw_sum and raw_weighted so far
  float per_bit, least;                    // of Keep, least of min_p
  float low, scale;                        // buckets
  uint32_t finite;                         // values of the row
  float edge, next_edge;                   // the threshold t has edge <= t < next_edge
  uint64_t mass_above;                     // of values >= next_edge, by fixed_mass
  uint32_t above, inside;                  // how many values are >= next_edge, and between the edges
  uint32_t kept;                           // how many values are kept in chunks without a value between the edges
  uint32_t low_key, high_key;              // of values between the edges
  uint32_t tickets[2];                     // blocks that have counted and collected
};

// The state after all blocks have collected.
FA_HD RowState collected_state(const RowState* state) {
  RowState known = *state;
  known.mass_above = fresh(&state->mass_above);
  known.above = fresh(&state->above);
  known.inside = fresh(&state->inside);
  known.kept = fresh(&state->kept);
  known.low_key = fresh(&state->low_key);
  known.high_key = fresh(&state->high_key);
  return known;
}

// Shared memory of each launch: lanes of `over_block` and `sum_behind`, one kind at a time, and what follows.
struct Tops {
  float z, raw, low;
};
struct RowSums {
  double z, raw, raw_weighted;
  uint32_t finite, padding;  // shuffled word by word, so no byte is left out
};
struct Entered {  // in a race
  double sum;
  Lead lead;
};
struct BucketSums {
  double least, most;  // mass, relative to the largest value's
  uint32_t count, padding;
  FA_HD_MEMBER void operator+=(const BucketSums& next) {
    least += next.least;
    most += next.most;
    count += next.count;
  }
};
struct Collected {
  uint64_t mass_above;
  uint32_t above, kept;
};
struct Lowest {
  uint64_t mass;
  float z;
  uint32_t padding;
};
struct Shared {
  union {
    Tops tops[THREADS];
    RowSums sums[THREADS];
    BucketSums buckets[THREADS];
    Collected collected[THREADS];
    uint64_t totals[THREADS];
    uint32_t counts[THREADS];
    Lowest lowest[THREADS];
    Lead leads[THREADS];
    Entered entered[THREADS];
  };
  uint32_t bins[THREADS];
  uint32_t first_bucket, last_bucket;
  BucketSums whole;
  Drawn drawn;  // thread 0 alone writes it
};
struct ListShared : Shared {
  uint16_t survivors[MAX_CHUNKS];  // chunks that hold some value of interest, in any order
  uint32_t chunks;
};
struct CountShared : ListShared {
  uint32_t histogram[BUCKETS + THREADS];
};

// Lists the chunks of [first, last) that hold a kept value. ZERO: all of them keep nothing so far.
template <bool ZERO> FA_HD void list_survivors(ListShared& shared, ChunkSummary* s, int first, int last, const Keep& keep) {
  barrier();
  FA_THREADS(t) {
    if (t == 0) shared.chunks = 0;
  }
  barrier();
  FA_THREADS(t) {
    for (int c = first + t; c < last; c += THREADS) {
      if (keeps(keep, fresh(&s[c].top))) shared.survivors[take_slot(&shared.chunks)] = uint16_t(c);
      if (ZERO) s[c].sum = 0, s[c].finite = 0;
    }
  }
  barrier();
}

// A lower bound of `per_bit (z - top)` under top_p alone: V values of that size together hold no more than 1 - top_p of the mass.
FA_HD float simple_floor(int64_t V, double top_p, double sum) {
  const double budget = sum * ((1.0 - top_p) * 0.999 - 4e-6);  // less, by more than all roundings of fixed_mass and the sums
  return budget > 0 ? float(log_of(budget / double(V)) / LN2) - 0.01f : -INFINITY;
}

// More than a row has is as many as it has.
FA_HD uint32_t top_k_target(const RowOptions& o, uint32_t finite) { return uint32_t(o.top_k) < finite ? uint32_t(o.top_k) : finite; }

// A value at or below the k-th largest of the chunks' largest values, and so of the row's: one histogram with 256 bins.
FA_HD float low_of_top_k(Shared& shared, ChunkSummary* s, int chunks, float low, float top, int k) {
  const float scale = smaller_of((THREADS - 1) / (top - low), 1e30f);
  FA_THREADS(t) {
    shared.bins[t] = 0;
    if (t == 0) shared.first_bucket = 0;
  }
  barrier();
  PerThread<uint32_t> behind;
  FA_THREADS(t) {
    for_summaries(s, t, chunks, [&](int, const ChunkSummary& chunk) {
      if (chunk.top >= low) take_slot(&shared.bins[int((chunk.top - low) * scale)]);
    });
  }
  barrier();
  FA_THREADS(t) { behind[t] = shared.bins[t]; }
  sum_behind(behind, shared.counts);
  FA_THREADS(t) {
    if (behind[t] < uint32_t(k) && behind[t] + shared.bins[t] >= uint32_t(k)) shared.first_bucket = t;
  }
  barrier();
  const uint32_t bucket = shared.first_bucket;
  barrier();
  return bucket > 0 ? low + (float(bucket) - 0.01f) / scale : low;
}

// Prepares the launches after the first. Other blocks do not see the row before they run.
FA_HD void begin_search(Shared& shared, const RowOptions& o, ChunkSummary* s, int64_t V, float top, double sum, float row_low,
                        uint32_t finite, RowState* state, uint32_t* histogram) {
  const int chunks = int((V + CHUNK - 1) / CHUNK);
  const float k = per_bit(o.temperature);
  const bool searches = row_low < top && (o.top_p < 1 || (o.top_k > 0 && uint32_t(o.top_k) < finite));
  float low = larger_of(row_low, top - 1e38f);  // a range that is a finite number
  if (searches && o.top_k > 0) {
    if (o.top_k <= chunks) low = larger_of(low, low_of_top_k(shared, s, chunks, low, top, o.top_k));
  } else if (searches) {
    // Near 1 the mass below the threshold says where it lies, so the buckets go far enough down to know that mass.
    const double tail = 1 - o.top_p;
    const float floor = simple_floor(V, tail < 0.08 ? 1 - tail / 16 : o.top_p, sum);
    if (floor < 0) low = larger_of(low, top + floor / k);
  }
  FA_THREADS(t) {
    if (searches)
      for (int b = t; b < BUCKETS; b += THREADS) histogram[b] = 0;
    if (t == 0) {
      RowState begun = {};
      begun.step = searches ? RowState::SEARCH : RowState::KEEP;
      begun.drawn = shared.drawn;
      begun.per_bit = k;
      begun.least = o.min_p > 0 ? float(log_of(o.min_p) / LN2) : -INFINITY;
      begun.low = low;
      begun.scale = low < top ? smaller_of((BUCKETS - 2) / (top - low), 1e30f) : 0;
      begun.finite = finite;
      begun.edge = begun.next_edge = -INFINITY;
      begun.low_key = 0xffffffffu;
      *state = begun;
    }
  }
}

// The bucket of a value in the range, from 1 on. Higher values have no lower bucket. Bucket 0 is everything below the range.
FA_HD uint32_t bucket_of(const RowState& state, float z) {
  return bits_of((z - state.low) * state.scale + 8388608.0f) - 0x4affffffu;  // rounded by the addition of 2^23
}

// The second launch's share of a row: chunks [first, last). `histogram` is the row's.
template <class T>
FA_HD void count_chunks(CountShared& shared, const SampleJob& job, int64_t index, int first, int last, ChunkSummary* s, const RowState& state,
                        uint32_t* histogram) {
  const BlockRow<T> row = block_row<T>(job, index, options_of(job, index).penalty);
  Keep keep = everything(state.drawn.top, state.per_bit);
  keep.cut = state.low;
  FA_THREADS(t) {
    for (int b = t; b < BUCKETS; b += THREADS) shared.histogram[b] = 0;
  }
  list_survivors<false>(shared, s, first, last, keep);
  FA_WARPS(w) {
    for_chunks_of_warp(row, s, shared.survivors, int(shared.chunks), w, [&](int, float, PerThread<float[PER_LANE]>& z) {
      FA_LANES(w, t) {
        for (int j = 0; j < PER_LANE; ++j)
          if (z[t][j] >= state.low) take_slot(&shared.histogram[bucket_of(state, z[t][j])]);
      }
    });
  }
  barrier();
  FA_THREADS(t) {
    for (int b = t; b < BUCKETS; b += THREADS)
      if (shared.histogram[b]) add_to(histogram + b, shared.histogram[b]);
  }
}

// The smallest mass of a bucket's values, relative to the largest value's.
FA_HD double floor_mass(const RowState& state, int bucket) {
  if (bucket == 0) return 0;
  const float range = state.drawn.top - state.low, height = larger_of(float(bucket) - 1.5f, 0) * (1 / state.scale);
  return double(exp2_of(state.scale > 0 ? (smaller_of(height, range) - range) * state.per_bit : 0.0f));
}

// Whether the threshold can lie at or below the bucket that ends a sum from the top, and whether it must lie above it.
struct EdgeTest {
  double least_total, most_total, below, target;  // mass: of the row, of values below the range
  BucketSums whole;
  uint32_t target_count;
  bool counts;
  FA_HD_MEMBER bool certain(const BucketSums& from) const {
    if (counts) return from.count >= target_count;
    const double tail = least_total - below - (whole.most - from.most);
    return (tail > from.least ? tail : from.least) * (1 - 1e-5) >= target;
  }
  FA_HD_MEMBER bool possible(const BucketSums& from) const {
    if (counts) return from.count >= target_count;
    const double tail = most_total - (whole.least - from.least);
    return (tail < from.most ? tail : from.most) * (1 + 1e-5) >= target;
  }
};

// From the counts of the whole row: the buckets that can hold the threshold, and their edges.
FA_HD void find_edges(CountShared& shared, const RowOptions& o, const uint32_t* histogram, RowState* state) {
  constexpr int PART = BUCKETS / THREADS;  // of a thread; a word between parts keeps their threads in different banks
  const RowState known = *state;
  FA_THREADS(t) {
    for (int b = t; b < BUCKETS; b += THREADS) shared.histogram[b + b / PART] = fresh(histogram + b);
    if (t == 0) shared.first_bucket = shared.last_bucket = 0;
  }
  barrier();
  PerThread<BucketSums> part;
  FA_THREADS(t) {
    BucketSums sums = {};
    double least = floor_mass(known, t * PART);
    for (int b = t * PART; b < (t + 1) * PART; ++b) {
      const double most = floor_mass(known, b + 1);
      const uint32_t count = shared.histogram[b + t];
      sums += {count * least, count * most, count, 0};
      least = most;
    }
    part[t] = sums;
  }
  PerThread<BucketSums> behind = part;
  sum_behind(behind, shared.buckets);
  FA_THREADS(t) {
    if (t == 0) {
      shared.whole = behind[t];
      shared.whole += part[t];
    }
  }
  barrier();
  // Sums and fixed_mass agree to 4e-6 of the row's mass.
  const double total = known.drawn.sum, below = (known.finite - shared.whole.count) * floor_mass(known, 1);
  const EdgeTest test = {total * (1 - 4e-6), total * (1 + 4e-6), below, top_p_target(o, total * 0x1p40) * 0x1p-40,
                         shared.whole,       top_k_target(o, known.finite), o.top_k > 0};
  FA_THREADS(t) {
    BucketSums from = behind[t], until = behind[t];
    until += part[t];
    const bool has_last = !test.possible(from) && test.possible(until), has_first = !test.certain(from) && test.certain(until);
    uint32_t first = 0, last = 0;
    double most = floor_mass(known, (t + 1) * PART);
    for (int b = (t + 1) * PART - 1; (has_first || has_last) && b >= t * PART && b > 0; --b) {
      const double least = floor_mass(known, b);
      const uint32_t count = shared.histogram[b + t];
      from += {count * least, count * most, count, 0};
      most = least;
      if (has_last && last == 0 && test.possible(from)) last = b;
      if (has_first && first == 0 && test.certain(from)) first = b;
    }
    if (first > 0) raise_to(&shared.first_bucket, first);
    if (last > 0) raise_to(&shared.last_bucket, last);
  }
  barrier();
  FA_THREADS(t) {
    if (t == 0) {
      const uint32_t first = shared.first_bucket, last = shared.last_bucket;
      // A hundredth of a bucket is more than the roundings of bucket_of.
      if (first > 1) state->edge = known.low + (float(first) - 1.51f) / known.scale;
      else if (first == 1) state->edge = known.low;
      const bool both = o.top_k > 0 && o.top_p < 1;  // the list then holds all that top_k keeps
      state->next_edge = both || known.scale == 0 ? INFINITY : logit_of(key_of(known.low + (float(last) - 0.49f) / known.scale) + 1);
    }
  }
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
