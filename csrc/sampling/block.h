// The sampler by blocks of 256 threads. It computes what rows.h computes with vectors: the same sums in the same order.
//
// Blocks share a row's chunks, and the block that finishes last goes on alone, with the summaries at hand. Without filters one launch does it
// all. block_search.h says what the other two do.
#pragma once

#include "block_filters.h"
#include "block_summaries.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

// The largest values of the row, and its smallest finite z.
FA_HD Tops tops_of_row(Shared& shared, const ChunkSummary* s, int chunks) {
  const auto both = [](const Tops& a, const Tops& b) { return Tops{larger_of(a.z, b.z), larger_of(a.raw, b.raw), smaller_of(a.low, b.low)}; };
  FA_THREADS(t) {
    Tops tops = {-INFINITY, -INFINITY, INFINITY};
    for_summaries(s, t, chunks, [&](int, const ChunkSummary& chunk) { tops = both(tops, {chunk.top, chunk.raw_top, chunk.low}); });
    shared.tops[t] = tops;
  }
  return over_block(shared.tops, both);
}

// As `combined` in rows.h: of z with `per_bit`, and of the raw logits.
FA_HD RowSums sums_of_row(Shared& shared, const ChunkSummary* s, int chunks, const Tops& tops, float per_bit) {
  FA_THREADS(t) {
    RowSums sums = {};
    for_summaries<1>(s, t, chunks, [&](int, const ChunkSummary& chunk) {
      const float bits = (chunk.raw_top - tops.raw) * LOG2E;
      const double raw_sum = double(chunk.raw_sum), factor = double(exp2_of(bits));
      sums.raw += raw_sum * factor;
      sums.raw_weighted += (double(chunk.raw_weighted) + double(clamped(bits)) * raw_sum) * factor;
      sums.z += double(chunk.sum) * double(exp2_of((chunk.top - tops.z) * per_bit));
      sums.finite += uint32_t(chunk.finite);
    });
    shared.sums[t] = sums;
  }
  return over_block(shared.sums, [](const RowSums& a, const RowSums& b) {
    return RowSums{a.z + b.z, a.raw + b.raw, a.raw_weighted + b.raw_weighted, a.finite + b.finite, 0};
  });
}

// The winner of a race whose entries are in shared.leads, or NOBODY.
FA_HD uint32_t won(Shared& shared) {
  return over_block(shared.leads, [](const Lead& a, const Lead& b) { return leads(b, a) ? b : a; }).index;
}

FA_HD void write_invalid(const SampleJob& job, int64_t index) {
  FA_THREADS(t) {
    if (t == 0) write_unread(job, index, false);
  }
}

// The token of a row of whose draw shared.drawn has the rest. A warp a log: one thread would take 3,000 cycles for all four.
template <class T> FA_HD void write_token(Shared& shared, const SampleJob& job, int64_t index, double kept_sum, uint32_t token) {
  barrier();
  FA_THREADS(t) {
    const int which = t / WARP;
    if (t % WARP == 0 && which < 4) {
      const RowOptions o = options_of(job, index);
      const BlockRow<T> row = block_row<T>(job, index, o.penalty);
      Drawn d = shared.drawn;
      d.kept_sum = kept_sum;
      d.token = token;
      d.z = logit(row, int(token));
      d.x = raw_logit(row, int(token));
      job.logs[which * job.B + index] = drawn_log(d, o.temperature, which);
      if (which == 0) write_draw(job, index, d);
    }
  }
}

// Temperature 0: a race of the ids with the largest logit, which the lowest id wins.
template <class T> FA_HD void take_largest(Shared& shared, const SampleJob& job, int64_t index, const ChunkSummary* s, float top) {
  const BlockRow<T> row = block_row<T>(job, index, options_of(job, index).penalty);
  const int chunks = (row.V + CHUNK - 1) / CHUNK;
  FA_THREADS(t) {
    shared.leads[t] = {INFINITY, NOBODY};
    for (int c = t; c < chunks; c += THREADS)
      if (fresh(&s[c].top) == top && leads({0.0f, uint32_t(c)}, shared.leads[t])) shared.leads[t] = {0.0f, uint32_t(c)};
  }
  const uint32_t chunk = won(shared);
  FA_THREADS(t) {
    const uint32_t id = chunk * CHUNK + t;
    shared.leads[t] = logit(row, int(id)) == top ? Lead{0.0f, id} : Lead{INFINITY, NOBODY};
  }
  const uint32_t token = won(shared);
  if (token == NOBODY) return write_invalid(job, index);
  FA_THREADS(t) {
    if (t == 0) shared.drawn.sum = shared.drawn.kept = 1;
  }
  write_token<T>(shared, job, index, 1, token);
}

// The race of the chunks with their kept masses, then of the winner's ids.
template <class T> FA_HD void race(Shared& shared, const SampleJob& job, int64_t index, const RowOptions& o, const BlockRow<T>& row,
                                          const ChunkSummary* s, const Keep& keep) {
  const int chunks = (row.V + CHUNK - 1) / CHUNK;
  FA_THREADS(t) {
    Entered entered = {0, {INFINITY, NOBODY}};
    for_summaries<2>(s, t, chunks, [&](int c, const ChunkSummary& chunk) {
      const float factor = exp2_of((chunk.top - keep.top) * keep.per_bit), mass = chunk.sum * factor;
      const Lead entry = {exponential<float>(o.noise, CHUNK_TAG | uint32_t(c)) / mass, uint32_t(c)};
      if (mass > 0 && leads(entry, entered.lead)) entered.lead = entry;
      entered.sum += double(chunk.sum) * double(factor);  // as `combined` in rows.h
    });
    shared.entered[t] = entered;
  }
  const Entered whole = over_block(shared.entered, [](const Entered& a, const Entered& b) {
    return Entered{a.sum + b.sum, leads(b.lead, a.lead) ? b.lead : a.lead};
  });
  const uint32_t chunk = whole.lead.index;
  if (chunk == NOBODY) return write_invalid(job, index);  // options out of range, which a GPU does not check by default
  FA_THREADS(t) {
    const uint32_t id = chunk * CHUNK + t;
    const float z = logit(row, int(id)), mass = exp2_of((z - fresh(&s[chunk].top)) * keep.per_bit);
    shared.leads[t] = mass > 0 && keeps(keep, z) ? Lead{exponential<float>(o.noise, id) / mass, id} : Lead{INFINITY, NOBODY};
  }
  const uint32_t token = won(shared);
  if (token == NOBODY) return write_invalid(job, index);
  write_token<T>(shared, job, index, whole.sum, token);
}

// The end of the first launch, by a row's last block: draws the row, or begins the search for its threshold. `state` and `histogram` are null
// where no row has a filter.
template <class T>
FA_HD void end_summaries(Shared& shared, const SampleJob& job, int64_t index, ChunkSummary* s, RowState* state, uint32_t* histogram) {
  const RowOptions o = options_of(job, index);
  const int chunks = int((job.V + CHUNK - 1) / CHUNK);
  FA_THREADS(t) {
    if (t == 0 && state) state->step = RowState::DRAWN;
  }
  const bool greedy = o.temperature == 0;
  const float k = greedy ? LOG2E : per_bit(o.temperature);
  const Tops tops = tops_of_row(shared, s, chunks);
  const RowSums sums = sums_of_row(shared, s, chunks, tops, k);
  // raw_weighted is NaN if a logit is NaN or +inf, the sum of z if a penalty made one +inf.
  if (!(sums.raw_weighted <= 0) || tops.z == -INFINITY || !(greedy || sums.z < INFINITY)) return write_invalid(job, index);
  FA_THREADS(t) {
    if (t == 0) {
      Drawn d = {};
      d.top = tops.z;
      d.raw_top = tops.raw;
      d.sum = sums.z;
      d.raw_sum = sums.raw;
      d.raw_weighted = sums.raw_weighted;
      d.kept = sums.finite;
      shared.drawn = d;
    }
  }
  if (greedy) return take_largest<T>(shared, job, index, s, tops.z);
  if (filters(o)) return begin_search(shared, o, s, job.V, tops.z, sums.z, tops.low, sums.finite, state, histogram);
  const RowOptions options = options_of(job, index);  // again, for registers
  race(shared, job, index, options, block_row<T>(job, index, options.penalty), s, everything(tops.z, k));
}

// Adds a value to the list of this block.
FA_HD void list_value(FilterShared& shared, float z) {
  const uint32_t slot = take_slot(&shared.candidates), key = key_of(z);
  if (slot < CANDIDATES) shared.values[slot] = z;
  if (key < *static_cast<volatile uint32_t*>(&shared.low)) lower_to(&shared.low, key);
  if (key > *static_cast<volatile uint32_t*>(&shared.high)) raise_to(&shared.high, key);
}

// The third launch's share of a row: chunks [first, last). It writes the sum of each chunk's kept values. If the chunk has one value between the
// edges, it writes the sums without and with that value, and the value to `low`. If it has more, the sum is OPEN.
constexpr float OPEN = -1;
template <class T>
FA_HD void collect_chunks(FilterShared& shared, const SampleJob& job, int64_t index, int first, int last, ChunkSummary* s, RowState* state, float* list) {
  const RowState known = *state;
  const RowOptions o = options_of(job, index);
  const BlockRow<T> row = block_row<T>(job, index, o.penalty);
  const bool searches = known.step == RowState::SEARCH, weighs = searches && o.top_k == 0;
  Keep keep = everything(known.drawn.top, known.per_bit);
  keep.cut = known.edge;
  if (!searches) keep.least = known.least;
  FA_THREADS(t) {
    if (t == 0) {
      shared.candidates = shared.high = 0;
      shared.low = 0xffffffffu;
    }
  }
  list_survivors<true>(shared, s, first, last, keep);
  PerThread<Collected> collected;
  FA_THREADS(t) { collected[t] = {}; }
  FA_WARPS(w) {
    for_chunks_of_warp(row, s, shared.survivors, int(shared.chunks), w, [&](int chunk, float top, PerThread<float[PER_LANE]>& z) {
      PerThread<float> sum;
      PerThread<uint32_t> open, open_values, kept;  // open: a bit a value
      FA_LANES(w, t) {
        uint32_t above = 0;
        open[t] = kept[t] = 0;
        FA_UNROLL
        for (int j = 0; j < PER_LANE; ++j) {
          const bool finite = z[t][j] > -INFINITY, is_above = finite && z[t][j] >= known.next_edge;
          above |= uint32_t(is_above) << j;
          open[t] |= uint32_t(finite && !is_above && z[t][j] >= known.edge) << j;
        }
        sum[t] = 0;
        collected[t].above += number_of_bits(above);
        FA_ONE_COPY
        for (; above; above &= above - 1) {  // few values of a warp, if the softmax is peaked
          const float value = value_at(z[t], lowest_bit(above)), bits = (value - keep.top) * keep.per_bit;
          if (weighs) collected[t].mass_above += fixed_mass(exp2_of_clamped(clamped(bits)));
          if (bits >= known.least) {
            sum[t] += exp2_of_clamped(clamped((value - top) * keep.per_bit));
            ++kept[t];
          }
        }
        FA_ONE_COPY
        for (uint32_t left = open[t]; left; left &= left - 1) list_value(shared, value_at(z[t], lowest_bit(left)));
      }
      FA_LANES(w, t) { open_values[t] = number_of_bits(open[t]); }
      count_over_warp(open_values, w);
      const uint32_t undecided = open_values[w * WARP];
      float sum_with = 0;
      if (undecided == 1) {
        PerThread<float> with, value;
        FA_LANES(w, t) {
          value[t] = open[t] ? value_at(z[t], lowest_bit(open[t])) : -INFINITY;
          with[t] = 0;
          uint32_t in = 0;
          FA_UNROLL
          for (int j = 0; j < PER_LANE; ++j)
            in |= uint32_t((z[t][j] >= known.next_edge || open[t] >> j & 1) && (z[t][j] - keep.top) * keep.per_bit >= known.least) << j;
          FA_ONE_COPY
          for (; in; in &= in - 1) with[t] += exp2_of_clamped(clamped((value_at(z[t], lowest_bit(in)) - top) * keep.per_bit));
        }
        sum_over_warp(with, w);
        largest_over_warp(value, w);
        sum_with = with[w * WARP];
        FA_LANES(w, t) {
          if (t % WARP == 0) {
            s[chunk].sum_with = sum_with;
            s[chunk].low = value[t];
          }
        }
      }
      sum_over_warp(sum, w);
      FA_LANES(w, t) {
        if (undecided <= 1) collected[t].kept += kept[t];
        if (t % WARP == 0) {
          s[chunk].sum = undecided > 1 ? OPEN : sum[t];
          s[chunk].finite = undecided == 1;
        }
      }
    });
  }
  FA_THREADS(t) { shared.collected[t] = collected[t]; }
  const Collected whole = over_block(shared.collected, [](const Collected& a, const Collected& b) {
    return Collected{a.mass_above + b.mass_above, a.above + b.above, a.kept + b.kept};
  });
  FA_THREADS(t) {
    if (t == 0) {
      shared.slot = take_slots(&state->inside, shared.candidates);
      add_to(&state->mass_above, whole.mass_above);
      add_to(&state->above, whole.above);
      add_to(&state->kept, whole.kept);
      lower_to(&state->low_key, shared.low);
      raise_to(&state->high_key, shared.high);
    }
  }
  barrier();
  FA_THREADS(t) {
    for (uint32_t i = t; i < shared.candidates && shared.slot + i < CANDIDATES; i += THREADS) list[shared.slot + i] = shared.values[i];
  }
}

// Closes the chunks with one value between the edges, and lists the others that have some. Returns how many more values are kept.
FA_HD uint32_t close_chunks(ListShared& shared, ChunkSummary* s, int chunks, const Keep& keep) {
  FA_THREADS(t) {
    if (t == 0) shared.chunks = 0;
  }
  barrier();
  FA_THREADS(t) {
    uint32_t count = 0;
    for_summaries<1>(s, t, chunks, [&](int c, const ChunkSummary& chunk) {
      if (chunk.sum == OPEN) {
        shared.survivors[take_slot(&shared.chunks)] = uint16_t(c);
      } else if (chunk.finite && keeps(keep, chunk.low)) {
        s[c].sum = chunk.sum_with;
        ++count;
      }
    });
    shared.counts[t] = count;
  }
  return over_block(shared.counts, [](uint32_t a, uint32_t b) { return a + b; });
}

// Writes the sum of the kept values of each listed chunk to s.sum and returns how many values are kept.
template <class T> FA_HD uint32_t keep_survivors(FilterShared& shared, const BlockRow<T>& row, ChunkSummary* s, const Keep& keep) {
  PerThread<uint32_t> count;
  FA_THREADS(t) { count[t] = 0; }
  FA_WARPS(w) {
    for_chunks_of_warp(row, s, shared.survivors, int(shared.chunks), w, [&](int chunk, float top, PerThread<float[PER_LANE]>& z) {
      PerThread<float> sum;
      FA_LANES(w, t) {
        sum[t] = 0;
        uint32_t in = 0;
        FA_UNROLL
        for (int j = 0; j < PER_LANE; ++j) in |= uint32_t(keeps(keep, z[t][j])) << j;
        count[t] += number_of_bits(in);
        FA_ONE_COPY
        for (; in; in &= in - 1) sum[t] += exp2_of_clamped(clamped((value_at(z[t], lowest_bit(in)) - top) * keep.per_bit));
      }
      sum_over_warp(sum, w);
      FA_LANES(w, t) {
        if (t % WARP == 0) s[chunk].sum = sum[t];
      }
    });
  }
  FA_THREADS(t) { shared.counts[t] = count[t]; }
  return over_block(shared.counts, [](uint32_t a, uint32_t b) { return a + b; });
}

// The end of the third launch, by a row's last block: the threshold, the sums that were open, and the draw.
template <class T>
FA_HD void end_collection(FilterShared& shared, const SampleJob& job, int64_t index, ChunkSummary* s, const RowState* state, const float* list) {
  const RowOptions o = options_of(job, index);
  const BlockRow<T> row = block_row<T>(job, index, o.penalty);
  const int chunks = (row.V + CHUNK - 1) / CHUNK;
  Keep keep = everything(state->drawn.top, state->per_bit);
  const bool searches = state->step == RowState::SEARCH, listed = searches && cut_by_list(shared, row, o, s, collected_state(state), list, keep.cut);
  if (searches && !listed) keep.cut = cut_by_one_block(shared, row, o, s, *state);
  // The state is read where it is needed, for registers.
  keep.least = fresh(&state->least);
  uint32_t kept = fresh(&state->kept);
  if (listed) {
    kept += close_chunks(shared, s, chunks, keep);
  } else if (searches) {
    kept = 0;
    list_survivors<true>(shared, s, 0, chunks, keep);
  }
  if (searches) kept += keep_survivors(shared, row, s, keep);
  FA_THREADS(t) {
    if (t == 0) {
      shared.drawn = state->drawn;
      shared.drawn.kept = kept;
    }
  }
  const RowOptions options = options_of(job, index);  // again, for registers
  race(shared, job, index, options, block_row<T>(job, index, options.penalty), s, keep);
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
