// How a block of threads reads a row of logits: a warp a chunk, thread l of it the ids l, l + 32, ... of the chunk.
#pragma once

#include "api.h"
#include "lockstep.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

constexpr int PER_LANE = CHUNK / CHUNK_LANES;

// As Summaries, a chunk a sector of memory.
struct alignas(32) ChunkSummary {
  float top, sum;
  float low;  // the smallest z > -inf, +inf if there is none
  union {
    float raw_top;
    float sum_with;  // see collect_chunks
  };
  float exponential;  // of the chunk, for the race of the chunks
  int32_t finite;
  float raw_sum, raw_weighted;
};

// Reads what other blocks wrote, in parts: nvcc drops those that the caller does not use.
FA_HD ChunkSummary fresh_summary(const ChunkSummary* p) {
#ifdef __CUDA_ARCH__
  struct { float4 first; float2 second, third; } words = {__ldcg(reinterpret_cast<const float4*>(p)), __ldcg(reinterpret_cast<const float2*>(p) + 2),
                                                          __ldcg(reinterpret_cast<const float2*>(p) + 3)};
  ChunkSummary summary;
  memcpy(&summary, &words, sizeof summary);
  return summary;
#else
  return *p;
#endif
}

// Calls f(c, summary) for the row's chunks c = t, t + 256, ... of thread t. It asks for some before it uses the first.
template <int AT_ONCE = 3, class F> FA_HD void for_summaries(const ChunkSummary* s, int t, int chunks, F f) {
  for (int first = t; first < chunks; first += AT_ONCE * THREADS) {
    ChunkSummary summaries[AT_ONCE];
    FA_UNROLL
    for (int i = 0; i < AT_ONCE; ++i)
      if (first + i * THREADS < chunks) summaries[i] = fresh_summary(s + first + i * THREADS);
    FA_UNROLL
    for (int i = 0; i < AT_ONCE; ++i)
      if (first + i * THREADS < chunks) f(first + i * THREADS, summaries[i]);
  }
}

FA_HD float widened(float x) { return x; }
FA_HD float widened(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
FA_HD float widened(fp16 x) {  // see dtypes.h
  const uint32_t moved = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(moved) * 0x1p112f);
  return bit_cast<float>((moved >= 0x0f800000u ? moved | 0x7f800000u : finite) | uint32_t(x.bits & 0x8000) << 16);
}

template <class T> struct BlockRow {
  const T* x;
  int V;
  const int32_t *seen, *allowed;
  float penalty;
};
template <class T> FA_HD BlockRow<T> block_row(const SampleJob& job, int64_t index, float penalty) {
  const int64_t words = (job.V + 31) / 32;
  return {static_cast<const T*>(job.logits) + index * job.row_stride, int(job.V), job.seen && penalty != 1 ? job.seen + index * words : nullptr,
          job.allowed ? job.allowed + index * words : nullptr, penalty};
}
template <class T> FA_HD bool masked(const BlockRow<T>& row) { return row.seen || row.allowed; }
template <class T> FA_HD bool whole_chunk(const BlockRow<T>& row, int chunk) { return (chunk + 1) * CHUNK <= row.V; }
template <class T> FA_HD float raw_logit(const BlockRow<T>& row, int id) { return id < row.V ? widened(row.x[id]) : -INFINITY; }

// z of an id, that is of bit id % 32 of word id / 32, given its raw logit.
template <class T> FA_HD float masked_logit(const BlockRow<T>& row, int word, int bit, float x) {
  if (row.seen && uint32_t(row.seen[word]) >> bit & 1) x = penalised(x, row.penalty);
  if (row.allowed && !(uint32_t(row.allowed[word]) >> bit & 1)) x = -INFINITY;
  return x;
}
template <class T> FA_HD float logit(const BlockRow<T>& row, int id, float x) { return id < row.V ? masked_logit(row, id / 32, id % 32, x) : x; }

// Chunks on their way from memory. A warp asks for its next chunk before it computes on the one at hand, so that loads are always in flight.
template <class T> struct ChunkLoads {
  PerThread<T[PER_LANE]> next;

  // Loads alone: next to arithmetic, nvcc waits for each load before it issues the next.
  FA_HD_MEMBER void ask(const BlockRow<T>& row, int t, int chunk) {
    const T* p = row.x + chunk * CHUNK + t % WARP;
    if (whole_chunk(row, chunk))
      for (int j = 0; j < PER_LANE; ++j) next[t][j] = p[j * CHUNK_LANES];
  }
  // The raw logits of the chunk that was asked for; -inf beyond V.
  FA_HD_MEMBER void take(const BlockRow<T>& row, int t, int chunk, float* x) {
    if (whole_chunk(row, chunk))
      for (int j = 0; j < PER_LANE; ++j) x[j] = widened(next[t][j]);
    else
      for (int j = 0; j < PER_LANE; ++j) x[j] = raw_logit(row, chunk * CHUNK + j * CHUNK_LANES + t % WARP);
  }
};

// values[j], without an index that would move the values from registers to memory.
FA_HD float value_at(const float* values, int j) {
  float half[4], quarter[2];
  FA_UNROLL
  for (int i = 0; i < 4; ++i) half[i] = j & 1 ? values[2 * i + 1] : values[2 * i];
  FA_UNROLL
  for (int i = 0; i < 2; ++i) quarter[i] = j & 2 ? half[2 * i + 1] : half[2 * i];
  return j & 4 ? quarter[1] : quarter[0];
}

// Raw logits of a chunk to z, in place.
template <class T> FA_HD void mask_chunk(const BlockRow<T>& row, int t, int chunk, float* x) {
  for (int j = 0; j < PER_LANE; ++j) {
    const int word = chunk * PER_LANE + j, bit = t % WARP;
    if (32 * word + bit < row.V) x[j] = masked_logit(row, word, bit, x[j]);
  }
}

// Calls f(chunk, top, z) for each listed chunk of a warp, in order; z[t] are the values of thread t, top the largest of all.
template <class T, class F>
FA_HD void for_chunks_of_warp(const BlockRow<T>& row, const ChunkSummary* s, const uint16_t* chunks, int count, int warp, F f) {
  ChunkLoads<T> loads;
  float next_top = 0;
  if (warp < count) {
    FA_LANES(warp, t) { loads.ask(row, t, chunks[warp]); }
    next_top = fresh(&s[chunks[warp]].top);
  }
  for (int i = warp; i < count; i += WARPS) {
    const int chunk = chunks[i];
    const float top = next_top;
    PerThread<float[PER_LANE]> z;
    FA_LANES(warp, t) {
      loads.take(row, t, chunk, z[t]);
      if (i + WARPS < count) loads.ask(row, t, chunks[i + WARPS]);
    }
    if (i + WARPS < count) next_top = fresh(&s[chunks[i + WARPS]].top);
    if (masked(row)) {
      FA_LANES(warp, t) { mask_chunk(row, t, chunk, z[t]); }
    }
    f(chunk, top, z);
  }
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
