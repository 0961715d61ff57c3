// Whitening over a mask, in blocks of tokens: first their moments, then the whitened values. policy/advantages.py has the formula. Torch-free.
#pragma once

#include "losses.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

// A vector of tokens in fp64, a register at a time.
template <class F> FA_INLINE void each_wide(f64v v, F f) { f(v); }
template <class F> FA_INLINE void each_wide(f32v v, F f) {
  const auto half = bit_cast<Halves>(v);
  f(__builtin_convertvector(half.low, f64v));
  f(__builtin_convertvector(half.high, f64v));
}

FA_INLINE f64v affine(f64v v, f64v mean, f64v factor, f64v offset) { return (v - mean) * factor + offset; }
FA_INLINE f32v affine(f32v v, f64v mean, f64v factor, f64v offset) {
  const auto half = bit_cast<Halves>(v);
  const f32h low = __builtin_convertvector(affine(__builtin_convertvector(half.low, f64v), mean, factor, offset), f32h);
  const f32h high = __builtin_convertvector(affine(__builtin_convertvector(half.high, f64v), mean, factor, offset), f32h);
#ifdef __AVX512F__  // where GCC 12 takes bit_cast through memory, and no load can be forwarded from two stores
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  return bit_cast<f32v>(Halves{low, high});
#endif
}

template <class A, class Vector> FA_INLINE void each_vector(const bool* mask, int64_t begin, int64_t end, Vector vector) {
  constexpr int L = Lanes<A>::count;
  int64_t n = begin;
  for (; n + L <= end; n += L) vector(Reader<A, true>(mask, n, L));
  if (n < end) vector(Reader<A, false>(mask, n, end - n));
}

// One read, by deviations from c, the block's first token inside the mask. The correction for c != mean cancels little: (c - mean)^2 is itself
// one of the squares that are summed, and the correction is that times the number of tokens. At most 2048 roundings of fp64 are lost.
template <class A> static void block_moments(const WhitenJob& job, int64_t begin, int64_t end, double* moments) {
  int64_t first = begin;
  while (first < end && !job.mask[first]) ++first;
  const A c = first < end ? static_cast<const A*>(job.x)[first] : A(0);
  const Vec<A> narrow = broadcast(c);
  const f64v wide = broadcast(double(c));
  typename Lanes<A>::ivec count = {};
  f64v sum = {}, squares = {};
  each_vector<A>(job.mask, begin, end, [&](const auto& read) __attribute__((always_inline)) {
    count -= read.inside;  // -1 inside
    each_wide(read.inside ? read(job.x) : narrow, [&](f64v v) __attribute__((always_inline)) {
      const f64v deviation = v - wide;
      sum += deviation;
      squares += deviation * deviation;
    });
  });
  double tokens = 0;
  for (int i = 0; i < Lanes<A>::count; ++i) tokens += double(count[i]);
  const double total = horizontal_sum<double>(sum), mean = total / (tokens > 0 ? tokens : 1);
  moments[M_COUNT] = tokens;
  moments[M_MEAN] = c + mean;
  moments[M_SQUARES] = horizontal_sum<double>(squares) - total * mean;
}

template <class A> static void block_whiten(const WhitenJob& job, int64_t begin, int64_t end) {
  // Broadcast once: in the loop, where a store might change the job, avx2 code took 130 us in place of 21 for 65,536 tokens.
  const f64v mean = broadcast(job.mean), factor = broadcast(job.factor), offset = broadcast(job.offset);
  each_vector<A>(job.mask, begin, end, [&](const auto& read) __attribute__((always_inline)) {
    read.store(job.out, read.inside ? affine(read(job.x), mean, factor, offset) : Vec<A>{});
  });
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
