// The shared memory of a block of threads, and how its threads read a row of logits.
#pragma once

#include "api.h"
#include "lockstep.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

constexpr int BUCKETS = 1024, CANDIDATES = 2048;

// 27 KiB, so that three blocks fit a multiprocessor with 100 KiB.
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
  uint16_t survivors[MAX_CHUNKS]; // chunks that hold some, in any order
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

FA_HD float larger_of(float a, float b) { return b > a ? b : a; }  // ignores NaN in b
FA_HD float finite_reference(float top) { return top == -INFINITY ? 0.0f : top; }

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
