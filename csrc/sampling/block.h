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
FA_HD RowSums sums_of_row(SummaryShared& shared, const ChunkSummary* s, int chunks, const Tops& tops, float per_bit) {
  FA_THREADS(t) {
    RowSums sums = {};
    for_summaries<2>(s, t, chunks, [&](int, const ChunkSummary& chunk) {
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

// Draws a token from its chunk, of which shared.leads has the race and z and x the thread's logit with and without penalties.
FA_HD void draw_winner(Shared& shared, const SampleJob& job, int64_t index, float temperature, uint32_t chunk, PerThread<float>& z, PerThread<float>& x) {
  const uint32_t token = won(shared);
  if (token == NOBODY) return write_invalid(job, index);
  FA_THREADS(t) {
    if (chunk * CHUNK + t == token) {
      Drawn d = shared.drawn;
      d.token = token;
      d.z = z[t];
      d.x = x[t];
      d.kept = shared.kept;
      write_draw(job, index, temperature, d);
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
  PerThread<float> z, x;
  FA_THREADS(t) {
    const int id = int(chunk * CHUNK + t);
    x[t] = raw_logit(row, id);
    z[t] = logit(row, id, x[t]);
    shared.leads[t] = z[t] == top ? Lead{0.0f, uint32_t(id)} : Lead{INFINITY, NOBODY};
    if (t == 0) shared.kept = 1;
  }
  draw_winner(shared, job, index, 0, chunk, z, x);
}

// The race of the chunks with their kept masses, then of the winner's ids. COLLECTED: a chunk with one value between the edges has two sums, and
// that value may still have to be counted.
template <bool COLLECTED, class T>
FA_HD void race(Shared& shared, const SampleJob& job, int64_t index, const RowOptions& o, const BlockRow<T>& row, const ChunkSummary* s, const Keep& keep) {
  const int chunks = (row.V + CHUNK - 1) / CHUNK;
  FA_THREADS(t) {
    Entered entered = {0, {INFINITY, NOBODY}};
    for_summaries<COLLECTED ? 3 : 2>(s, t, chunks, [&](int c, const ChunkSummary& chunk) {  // as many as registers hold
      const bool with = COLLECTED && chunk.finite && keeps(keep, chunk.low);
      const float sum = with ? chunk.sum_with : chunk.sum, factor = exp2_of((chunk.top - keep.top) * keep.per_bit), mass = sum * factor;
      if (mass > 0) {
        const Lead entry = {chunk.exponential / mass, uint32_t(c)};
        if (leads(entry, entered.lead)) entered.lead = entry;
      }
      entered.sum += double(sum) * double(factor);  // as `combined` in rows.h
      if (with) add_to(&shared.kept, 1);
    });
    shared.entered[t] = entered;
  }
  const Entered whole = over_block(shared.entered, [](const Entered& a, const Entered& b) {
    return Entered{a.sum + b.sum, leads(b.lead, a.lead) ? b.lead : a.lead};
  });
  const uint32_t chunk = whole.lead.index;
  if (chunk == NOBODY) return write_invalid(job, index);  // options out of range, which a GPU does not check by default
  PerThread<float> z, x;
  FA_THREADS(t) {
    const uint32_t id = chunk * CHUNK + t;
    const float top = fresh(&s[chunk].top);
    x[t] = raw_logit(row, int(id));
    const float noise = exponential<float>(o.noise, id);
    if (t == 0) shared.drawn.log_kept_sum = log_of(whole.sum);  // while the logits are on their way
    z[t] = logit(row, int(id), x[t]);
    const float mass = exp2_of((z[t] - top) * keep.per_bit);
    shared.leads[t] = mass > 0 && keeps(keep, z[t]) ? Lead{noise / mass, id} : Lead{INFINITY, NOBODY};
  }
  draw_winner(shared, job, index, o.temperature, chunk, z, x);
}

// The end of the first launch, by a row's last block: draws the row, or begins the search for its threshold. `memory` is null where no row has
// a filter.
template <class T> FA_HD void end_summaries(SummaryShared& shared, const SampleJob& job, int64_t index, ChunkSummary* s, RowMemory* memory) {
  const float temperature = options_of(job, index).temperature;
  const int chunks = int((job.V + CHUNK - 1) / CHUNK);
  FA_THREADS(t) {
    if (t == 0 && memory) memory->state.step = RowState::DRAWN;
  }
  const bool greedy = temperature == 0;
  const float k = greedy ? LOG2E : per_bit(temperature);
  const Tops tops = tops_of_row(shared, s, chunks);
  const RowSums sums = sums_of_row(shared, s, chunks, tops, k);
  // raw_weighted is NaN if a logit is NaN or +inf, the sum of z if a penalty made one +inf.
  if (!(sums.raw_weighted <= 0) || tops.z == -INFINITY || !(greedy || sums.z < INFINITY)) return write_invalid(job, index);
  const RowOptions o = options_of(job, index);  // again, for registers
  FA_THREADS(t) {  // a warp a logarithm: one thread would take longer for all
    const int which = t / WARP;
    if (t % WARP == 0 && which < LOGS) {
      const double x = which == SUM ? sums.z : which == RAW_SUM ? sums.raw : which == MIN_P ? o.min_p : dropped_mass(o, job.V, sums.z);
      shared.logs[which] = x > 0 ? log_of(x) : -INFINITY;
    }
  }
  barrier();
  FA_THREADS(t) {
    if (t == 0) {
      Drawn d = {};
      d.top = tops.z;
      d.raw_top = tops.raw;
      d.sum = sums.z;
      d.log_sum = shared.logs[SUM];
      d.log_raw_sum = shared.logs[RAW_SUM];
      d.entropy = entropy_of(shared.logs[RAW_SUM], sums.raw, sums.raw_weighted);
      shared.drawn = d;
      shared.kept = sums.finite;
    }
  }
  if (greedy) return take_largest<T>(shared, job, index, s, tops.z);
  if (filters(o)) return begin_search(shared, o, s, job.V, tops, sums.finite, memory);
  const RowOptions options = options_of(job, index);  // again, for registers
  race<false>(shared, job, index, options, block_row<T>(job, index, options.penalty), s, everything(tops.z, k));
}

// Adds a value to the list of this block.
FA_HD void list_value(FilterShared& shared, float z) {
  const uint32_t slot = take_slot(&shared.candidates), key = key_of(z);
  if (slot < CANDIDATES) shared.values[slot] = z;
  if (key < *static_cast<volatile uint32_t*>(&shared.low)) lower_to(&shared.low, key);
  if (key > *static_cast<volatile uint32_t*>(&shared.high)) raise_to(&shared.high, key);
}

// The third launch's share of a row: chunks [first, last). It writes the sum of each chunk's kept values. If the chunk has one value between the
// edges, it writes the sums without and with that value, and the value to `low`. If it has more, the chunk is open: it is listed.
template <class T>
FA_HD void collect_chunks(FilterShared& shared, const SampleJob& job, int64_t index, int first, int last, ChunkSummary* s, RowMemory* memory) {
  RowState* const state = &memory->state;
  const RowState known = *state;
  const RowOptions o = options_of(job, index);
  const BlockRow<T> row = block_row<T>(job, index, o.penalty);
  const bool searches = known.step == RowState::SEARCH, weighs = searches && o.top_k == 0;
  Keep keep = everything(known.drawn.top, known.per_bit);
  keep.cut = known.edge;
  if (!searches) keep.least = known.least;
  FA_THREADS(t) {
    if (t == 0) {
      shared.candidates = shared.open_chunks = shared.high = 0;
      shared.low = NO_KEY;
    }
  }
  list_survivors<true>(shared, s, first, last, keep);
  FA_WARPS(w) {
    PerThread<Collected> collected;
    FA_LANES(w, t) { collected[t] = {}; }
    for_chunks_of_warp(row, s, shared.survivors, int(shared.chunks), w, [&](int chunk, float top, PerThread<float[PER_LANE]>& z) {
      PerThread<float> sum;
      PerThread<uint32_t> open, open_values, kept;  // open: a bit a value
      FA_LANES(w, t) {
        uint32_t above = 0;
        open[t] = kept[t] = 0;
        FA_UNROLL
        for (int j = 0; j < PER_LANE; ++j) {
          above |= uint32_t(z[t][j] >= known.next_edge) << j;
          open[t] |= uint32_t(z[t][j] >= known.edge) << j;
        }
        open[t] &= ~above;
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
          s[chunk].sum = sum[t];
          s[chunk].finite = undecided == 1;
          if (undecided > 1) shared.open[take_slot(&shared.open_chunks)] = uint16_t(chunk);
        }
      }
    });
    over_warp(collected, w, [](const Collected& a, const Collected& b) {
      return Collected{a.mass_above + b.mass_above, a.above + b.above, a.kept + b.kept};
    });
    FA_LANES(w, t) {
      if (t % WARP == 0 && collected[t].above > 0) {
        add_to(&state->mass_above, collected[t].mass_above);
        add_to(&state->above, collected[t].above);
        add_to(&state->kept, collected[t].kept);
      }
    }
  }
  barrier();
  FA_THREADS(t) {
    if (t == 0) {
      shared.slot = take_slots(&state->inside, shared.candidates);
      shared.open_slot = take_slots(&state->open_chunks, shared.open_chunks);
      lower_to(&state->low_key, shared.low);
      raise_to(&state->high_key, shared.high);
    }
  }
  barrier();
  FA_THREADS(t) {
    for (uint32_t i = t; i < shared.candidates && shared.slot + i < CANDIDATES; i += THREADS) memory->list[shared.slot + i] = shared.values[i];
    for (uint32_t i = t; i < shared.open_chunks; i += THREADS) memory->histogram[shared.open_slot + i] = shared.open[i];
  }
}

// Writes the sum of the kept values of each listed chunk to s.sum and counts them.
template <class T> FA_HD void keep_survivors(FilterShared& shared, const BlockRow<T>& row, ChunkSummary* s, const Keep& keep) {
  FA_WARPS(w) {
    for_chunks_of_warp(row, s, shared.survivors, int(shared.chunks), w, [&](int chunk, float top, PerThread<float[PER_LANE]>& z) {
      PerThread<float> sum;
      PerThread<uint32_t> count;
      FA_LANES(w, t) {
        sum[t] = 0;
        uint32_t in = 0;
        FA_UNROLL
        for (int j = 0; j < PER_LANE; ++j) in |= uint32_t(keeps(keep, z[t][j])) << j;
        count[t] = number_of_bits(in);
        FA_ONE_COPY
        for (; in; in &= in - 1) sum[t] += exp2_of_clamped(clamped((value_at(z[t], lowest_bit(in)) - top) * keep.per_bit));
      }
      sum_over_warp(sum, w);
      count_over_warp(count, w);
      FA_LANES(w, t) {
        if (t % WARP == 0) {
          s[chunk].sum = sum[t];
          add_to(&shared.kept, count[t]);
        }
      }
    });
  }
  barrier();
}

// The end of the third launch, by a row's last block: the threshold, the sums that were open, and the draw.
template <class T> FA_HD void end_collection(FilterShared& shared, const SampleJob& job, int64_t index, ChunkSummary* s, RowMemory* memory) {
  const RowState* const state = &memory->state;
  const RowState known = collected_state(state);
  read_lists(shared, memory, known);  // empty ones without a search
  const RowOptions o = options_of(job, index);
  const BlockRow<T> row = block_row<T>(job, index, o.penalty);
  FA_THREADS(t) {
    if (t == 0) shared.drawn = state->drawn;
  }
  Keep keep = everything(known.drawn.top, known.per_bit);
  if (state->step == RowState::SEARCH) {
    // What comes is read where it is needed, for registers.
    if (!cut_by_list(shared, row, o, s, known, keep.cut)) {
      keep.cut = cut_by_one_block(shared, row, job, index, s, *state);
      keep.least = state->least;
      FA_THREADS(t) {
        if (t == 0) shared.kept = 0;
      }
      list_survivors<true>(shared, s, 0, int((job.V + CHUNK - 1) / CHUNK), keep);
    }
    keep.least = state->least;
    keep_survivors(shared, row, s, keep);
  }
  keep.least = state->least;
  const RowOptions options = options_of(job, index);
  race<true>(shared, job, index, options, block_row<T>(job, index, options.penalty), s, keep);
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
