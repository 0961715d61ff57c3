// How blocks that share a row find the threshold of top_k or top_p: the launches and what they leave each other.
//
//   1. summarise   the last block of a row knows its largest value, the range that the threshold lies in, and the sums (block.h)
//   2. count       all blocks count values in BUCKETS equal parts of that range. A count is weighted by the value's place in its bucket, which
//                  gives the last block close bounds of each bucket's mass. So it finds the few buckets that can hold the threshold.
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
constexpr uint32_t PLACES = 32;               // in a bucket
constexpr uint32_t NO_KEY = 0xffffffffu;      // above those of all logits
constexpr float LOWEST = -3.40282347e38f;     // of the finite numbers: values at or above it are > -inf
static_assert(BUCKETS >= MAX_CHUNKS, "a row's histogram has room for its open chunks");

// A row between two launches.
struct RowState {
  enum Step { DRAWN, SEARCH, KEEP } step;  // KEEP: the threshold is known to be at most the row's smallest value, or at its only value
  Drawn drawn;                             // what is known before the draw
  float per_bit, least;                    // of Keep, least of min_p
  float low, scale, width;                 // buckets; width: of one, in nats
  uint32_t weight, place_mask;             // a value counts weight + (place & place_mask), which is proportional to its mass within a bucket
  uint32_t finite;                         // values of the row
  float edge, next_edge;                   // the threshold t has edge <= t < next_edge
  uint64_t mass_above;                     // of values >= next_edge, by fixed_mass
  uint32_t above, inside;                  // how many values are >= next_edge, and between the edges
  uint32_t kept;                           // how many values are kept in chunks without a value between the edges
  uint32_t open_chunks;                    // how many chunks hold several values between the edges
  uint32_t low_key, high_key;              // of values between the edges
  uint32_t tickets[2];                     // blocks that have counted and collected
};

// What the launches leave each other of a row beside its summaries.
struct RowMemory {
  RowState state;
  uint32_t histogram[BUCKETS];  // the third launch lists the open chunks there
  float list[CANDIDATES];       // values between the edges
};

// The state after all blocks have collected.
FA_HD RowState collected_state(const RowState* state) {
  RowState known = *state;
  known.mass_above = fresh(&state->mass_above);
  known.above = fresh(&state->above);
  known.inside = fresh(&state->inside);
  known.kept = fresh(&state->kept);
  known.open_chunks = fresh(&state->open_chunks);
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
  double mass;  // about, relative to the largest value's
  uint32_t weight, padding;
  FA_HD_MEMBER void operator+=(const BucketSums& next) {
    mass += next.mass;
    weight += next.weight;
  }
};
struct Collected {
  uint64_t mass_above;
  uint32_t above, kept;
};
enum Log { SUM, RAW_SUM, MIN_P, DROPPED_MASS, LOGS };
struct Shared {
  union {
    Tops tops[THREADS];
    BucketSums buckets[THREADS];
    uint64_t totals[THREADS];
    uint32_t counts[THREADS];
    Lead leads[THREADS];
    Entered entered[THREADS];
  };
  uint32_t bins[THREADS];
  uint32_t first_bucket, last_bucket;
  uint32_t kept;  // how many values the filters keep
  BucketSums whole;
  double logs[LOGS];  // natural; -inf of what is not positive
  Drawn drawn;
};
struct SummaryShared : Shared {
  RowSums sums[THREADS];  // the largest lanes: other launches have no room for them
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
    FA_ONE_COPY
    for (int c = first + t; c < last; c += THREADS) {
      if (keeps(keep, fresh(&s[c].top))) shared.survivors[take_slot(&shared.chunks)] = uint16_t(c);
      if (ZERO) s[c].sum = 0, s[c].finite = 0;
    }
  }
  barrier();
}

// V values of this mass hold no more than 1 - top_p of the row's together, so that top_p alone drops them all; not positive: no such mass is
// known. Near 1 the mass below the threshold says where it lies, so there V values hold less, and the buckets go far enough down to know it.
FA_HD double dropped_mass(const RowOptions& o, int64_t V, double sum) {
  const double tail = 1 - o.top_p, share = tail < 0.08 ? tail / 16 : tail;
  return sum * (share * 0.999 - 4e-6) / double(V);  // less, by more than all roundings of fixed_mass and the sums
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

// How values of a bucket are counted. Mass grows over a bucket of `width` by a factor of about 1 + width, a weight by 1 + PLACES / weight.
// Wide buckets and top_k count values alone, and so do narrow buckets of which V values would not fit 32 bits.
FA_HD void choose_weight(RowState& state, int64_t V, bool counts) {
  const double weight = counts || !(state.width > 0) ? 0 : double(uint32_t(smaller_of(1 / state.width, 1e8f) + 0.5f)) * PLACES;
  const bool weighs = weight > 0 && double(V) * (weight + PLACES) < 0x1p32;
  state.weight = weighs ? uint32_t(weight) : 1;
  state.place_mask = weighs ? PLACES - 1 : 0;
}

// Prepares the launches after the first. Other blocks do not see the row before they run.
FA_HD void begin_search(Shared& shared, const RowOptions& o, ChunkSummary* s, int64_t V, const Tops& tops, uint32_t finite, RowMemory* memory) {
  const int chunks = int((V + CHUNK - 1) / CHUNK);
  const float k = per_bit(o.temperature), top = tops.z, row_low = tops.low;
  const bool searches = row_low < top && (o.top_p < 1 || (o.top_k > 0 && uint32_t(o.top_k) < finite));
  float low = larger_of(row_low, top - 1e38f);  // a range that is a finite number
  if (searches && o.top_k > 0) {
    if (o.top_k <= chunks) low = larger_of(low, low_of_top_k(shared, s, chunks, low, top, o.top_k));
  } else if (searches) {
    const float floor = float(shared.logs[DROPPED_MASS] / LN2) - 0.01f;
    if (floor < 0) low = larger_of(low, top + floor / k);
  }
  FA_THREADS(t) {
    if (searches)
      for (int b = t; b < BUCKETS; b += THREADS) memory->histogram[b] = 0;
    if (t == 0) {
      RowState begun = {};
      begun.step = searches ? RowState::SEARCH : RowState::KEEP;
      begun.drawn = shared.drawn;
      begun.per_bit = k;
      begun.least = float(shared.logs[MIN_P] / LN2);
      begun.low = low;
      begun.scale = low < top ? smaller_of((BUCKETS - 2) / (top - low), 1e30f) : 0;
      begun.width = begun.scale > 0 ? k * float(LN2) / begun.scale : 0;
      choose_weight(begun, V, o.top_k > 0);
      begun.finite = finite;
      begun.edge = begun.next_edge = LOWEST;
      begun.low_key = NO_KEY;
      memory->state = begun;
    }
  }
}

// Where a value of the range lies, in 1 / PLACES of a bucket: bucket b from 1 on has places (b - 1) PLACES and up. Higher values have no lower
// place. Bucket 0 is everything below the range.
FA_HD uint32_t place_of(float z, float low, float scale) {
  static_assert(PLACES == 32, "the last bit of 2^18 is 1 / 32");
  return bits_of((z - low) * scale + 262144.0f) - 0x48800000u;  // rounded by the addition of 2^18
}

// The second launch's share of a row: chunks [first, last).
template <class T>
FA_HD void count_chunks(CountShared& shared, const SampleJob& job, int64_t index, int first, int last, ChunkSummary* s, RowMemory* memory) {
  // A copy: after an atomic addition nvcc would read the state again, for each value.
  const RowState known = memory->state;
  const BlockRow<T> row = block_row<T>(job, index, options_of(job, index).penalty);
  Keep keep = everything(known.drawn.top, known.per_bit);
  keep.cut = known.low;
  FA_THREADS(t) {
    for (int b = t; b < BUCKETS; b += THREADS) shared.histogram[b] = 0;
  }
  list_survivors<false>(shared, s, first, last, keep);
  FA_WARPS(w) {
    for_chunks_of_warp(row, s, shared.survivors, int(shared.chunks), w, [&](int, float, PerThread<float[PER_LANE]>& z) {
      FA_LANES(w, t) {
        for (int j = 0; j < PER_LANE; ++j) {
          const uint32_t place = place_of(z[t][j], known.low, known.scale);
          add_if(z[t][j] >= known.low, &shared.histogram[1 + place / PLACES], known.weight | (place & known.place_mask));
        }
      }
    });
  }
  barrier();
  FA_THREADS(t) {
    for (int b = t; b < BUCKETS; b += THREADS)
      if (shared.histogram[b]) add_to(memory->histogram + b, shared.histogram[b]);
  }
}

// The mass of a value where a bucket begins, relative to the largest value's.
FA_HD double mass_of_bucket(const RowState& state, int bucket) {
  if (bucket == 0) return 0;
  const float range = state.drawn.top - state.low, height = float(bucket - 1) * (1 / state.scale);
  return double(exp2_of(state.scale > 0 ? (smaller_of(height, range) - range) * state.per_bit : 0.0f));
}

// Whether the threshold can lie at or below the bucket that ends a sum from the top, and whether it must lie above it.
struct EdgeTest {
  double least_total, most_total, below, target;  // mass: of the row, of values below the range
  double least, most;                             // factors: by how much a bucket's mass can differ from mass_of_bucket and its weight
  BucketSums whole;
  uint32_t target_count;
  bool counts;
  FA_HD_MEMBER bool certain(const BucketSums& from) const {
    if (counts) return from.weight >= target_count;
    const double tail = least_total - below - (whole.mass - from.mass) * most, head = from.mass * least;
    return (tail > head ? tail : head) * (1 - 1e-5) >= target;
  }
  FA_HD_MEMBER bool possible(const BucketSums& from) const {
    if (counts) return from.weight >= target_count;
    const double tail = most_total - (whole.mass - from.mass) * least, head = from.mass * most;
    return (tail < head ? tail : head) * (1 + 1e-5) >= target;
  }
};

// From the counts of the whole row: the buckets that can hold the threshold, and their edges.
FA_HD void find_edges(CountShared& shared, const RowOptions& o, RowMemory* memory) {
  constexpr int PART = BUCKETS / THREADS;  // of a thread; a word between parts keeps their threads in different banks
  constexpr float ROUNDED = 0.005f;        // of a bucket: more than the roundings of place_of and mass_of_bucket, about 0.001
  constexpr float OFF_PLACE = 0.5f / PLACES + ROUNDED;  // of a bucket: by how much a value can lie off its place, or outside its bucket
  RowState* const state = &memory->state;
  const RowState known = *state;
  FA_THREADS(t) {
    FA_UNROLL
    for (int i = 0; i < PART; ++i) shared.histogram[t + i * THREADS + (t + i * THREADS) / PART] = fresh(memory->histogram + t + i * THREADS);
    if (t == 0) shared.first_bucket = shared.last_bucket = 0;
  }
  barrier();
  PerThread<BucketSums> part;
  const double unit = 1.0 / known.weight;
  FA_THREADS(t) {
    BucketSums sums = {};
    for (int b = t * PART; b < (t + 1) * PART; ++b) {
      const uint32_t weight = shared.histogram[b + t];
      sums += {weight * unit * mass_of_bucket(known, b), weight, 0};
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
  const double total = known.drawn.sum;
  const uint32_t counted = shared.whole.weight / (known.weight + known.place_mask);  // at least as many are in the range
  // A weight is off the mass at a value's place by up to width^2, or by the whole width if it does not tell the place.
  const float below = known.width * (OFF_PLACE + known.width), above = known.width * (OFF_PLACE + (known.place_mask ? known.width : 1));
  const EdgeTest test = {.least_total = total * (1 - 4e-6),
                         .most_total = total * (1 + 4e-6),
                         .below = (known.finite - counted) * mass_of_bucket(known, 1),
                         .target = top_p_target(o, total * 0x1p40) * 0x1p-40,
                         .least = 1 - double(smaller_of(below, 1)),
                         .most = 1 / double(exp2_of(-above * LOG2E)),
                         .whole = shared.whole,
                         .target_count = top_k_target(o, known.finite),
                         .counts = o.top_k > 0};
  FA_THREADS(t) {
    BucketSums from = behind[t], until = behind[t];
    until += part[t];
    const bool has_last = !test.possible(from) && test.possible(until), has_first = !test.certain(from) && test.certain(until);
    uint32_t first = 0, last = 0;
    for (int b = (t + 1) * PART - 1; (has_first || has_last) && b >= t * PART && b > 0; --b) {
      const uint32_t weight = shared.histogram[b + t];
      from += {weight * unit * mass_of_bucket(known, b), weight, 0};
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
      if (first > 1) state->edge = known.low + (float(first) - 1 - OFF_PLACE) / known.scale;
      else if (first == 1) state->edge = known.low;
      const bool both = o.top_k > 0 && o.top_p < 1;  // the list then holds all that top_k keeps
      state->next_edge = both || known.scale == 0 ? INFINITY : logit_of(key_of(known.low + (float(last) + ROUNDED) / known.scale) + 1);
    }
  }
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
