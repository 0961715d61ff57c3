// The first read of a row by blocks: the summaries of its chunks, with the sums of rows.h in the same order.
#pragma once

#include "block_row.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

FA_HD float finite_reference(float top) { return top == -INFINITY ? 0.0f : top; }

// How many values of a warp's chunk are finite, and the smallest of those.
struct Extent {
  PerThread<uint32_t> finite;
  PerThread<float> low;
};
FA_HD void find_extent(PerThread<float[PER_LANE]>& z, int warp, Extent& extent) {
  FA_LANES(warp, t) {
    extent.low[t] = z[t][0];
    for (int j = 1; j < PER_LANE; ++j) extent.low[t] = smaller_of(extent.low[t], z[t][j]);
    extent.finite[t] = CHUNK;
  }
  smallest_over_warp(extent.low, warp);
  if (extent.low[warp * WARP] > -INFINITY) return;
  FA_LANES(warp, t) {
    extent.finite[t] = 0;
    extent.low[t] = INFINITY;
    for (int j = 0; j < PER_LANE; ++j) {
      extent.finite[t] += z[t][j] > -INFINITY;
      if (z[t][j] > -INFINITY) extent.low[t] = smaller_of(extent.low[t], z[t][j]);
    }
  }
  smallest_over_warp(extent.low, warp);
  count_over_warp(extent.finite, warp);
}

FA_HD void find_top(PerThread<float[PER_LANE]>& x, int warp, PerThread<float>& top) {
  FA_LANES(warp, t) {
    top[t] = -INFINITY;
    for (int j = 0; j < PER_LANE; ++j) top[t] = larger_of(top[t], x[t][j]);
  }
  largest_over_warp(top, warp);
}

// Summaries of chunks [first, last) of a row.
template <class T> FA_HD void summarise_chunks(const SampleJob& job, int64_t index, int first, int last, ChunkSummary* out) {
  const RowOptions options = options_of(job, index);
  const BlockRow<T> row = block_row<T>(job, index, options.penalty);
  const float k = per_bit(options.temperature > 0 ? options.temperature : 1.0f);
  const bool tempered = masked(row) || k != LOG2E;
  FA_WARPS(w) {
    ChunkLoads<T> loads;
    if (first + w < last) {
      FA_LANES(w, t) { loads.ask(row, t, first + w); }
    }
    FA_LANES(w, t) {  // while the first chunk is on its way
      for (int c = first + t; c < last; c += THREADS) out[c].exponential = exponential<float>(options.noise, CHUNK_TAG | uint32_t(c));
    }
    for (int chunk = first + w; chunk < last; chunk += WARPS) {
      PerThread<float[PER_LANE]> x;
      PerThread<float> raw_top, raw_sum, raw_weighted, top, sum;
      Extent extent;
      FA_LANES(w, t) {
        loads.take(row, t, chunk, x[t]);
        if (chunk + WARPS < last) loads.ask(row, t, chunk + WARPS);
      }
      find_top(x, w, raw_top);
      FA_LANES(w, t) {
        raw_sum[t] = raw_weighted[t] = 0;
        for (int j = 0; j < PER_LANE; ++j) {
          // A NaN or +inf shows in raw_weighted.
          const float bits = clamped((x[t][j] - finite_reference(raw_top[t])) * LOG2E), e = exp2_of_clamped(bits);
          raw_sum[t] += e;
          raw_weighted[t] = fused(bits, e, raw_weighted[t]);
        }
        top[t] = raw_top[t];
      }
      if (masked(row)) {
        FA_LANES(w, t) { mask_chunk(row, t, chunk, x[t]); }
        find_top(x, w, top);
      }
      find_extent(x, w, extent);
      if (tempered) {
        FA_LANES(w, t) {
          sum[t] = 0;
          for (int j = 0; j < PER_LANE; ++j) sum[t] += exp2_of_clamped(clamped((x[t][j] - finite_reference(top[t])) * k));
        }
        sum_over_warp(sum, w);
      }
      two_sums_over_warp(raw_sum, raw_weighted, w);
      FA_LANES(w, t) {
        // A penalty can make a finite logit +inf, which raw_weighted does not show.
        const float sum_of_z = !tempered ? raw_sum[t] : top[t] < INFINITY ? sum[t] : NAN;
        if (t % WARP == 0) {  // another thread writes the exponential
          ChunkSummary& summary = out[chunk];
          summary.raw_top = raw_top[t];
          summary.top = top[t];
          summary.sum = sum_of_z;
          summary.low = extent.low[t];
          summary.raw_sum = raw_sum[t];
          summary.raw_weighted = raw_weighted[t];
          summary.finite = int32_t(extent.finite[t]);
        }
      }
    }
  }
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
