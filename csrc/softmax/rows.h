// One row of logits: its statistics in one read, its gradient in one read and one write. Torch-free.
//
//   u = logit_scale * (x + bias);   c = softcap * tanh(u / softcap)  (c = u without softcap);   z = c / temperature
//   logp = z[id] - lse;   mean_logp = mean_v z[v] - lse;   entropy = -sum_v P[v] log P[v];   P[v] = exp(z[v] - lse)
//   dz[v] = onehot * [v == id] + P[v] * (prob + plogp * log P[v]) + uniform;   dx[v] = dz[v] * dz/dx
//
// The four coefficients (onehot, prob, plogp, uniform) cover every loss of the statistics, so one gradient kernel serves all losses.
// lse is stored as (max, logsum): max + logsum rounds to 1e-3 at |z| = 1e4, which would be a relative error of 1e-3 in P.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../common/vectors.h"
#include "api.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

enum Stat { LOGP, MEAN_LOGP, ENTROPY, LSE, MAX, LOGSUM, TOP1, STATS };
enum Coefficient { ONEHOT, PROB, PLOGP, UNIFORM, COEFFICIENTS };

// z and dz/dx of a vector of raw logits. PLAIN: no bias, scale, softcap or temperature; the common case.
template <class A, bool PLAIN> struct Transformed {
  Vec<A> z, slope;
};
template <class A, bool PLAIN>
FA_INLINE Transformed<A, PLAIN> transform(Vec<A> x, Vec<A> bias, const Transform& t) {
  if constexpr (PLAIN) return {x, Vec<A>{}};
  Vec<A> z = (x + bias) * A(t.logit_scale);
  Vec<A> slope = broadcast(A(t.logit_scale));
  if (t.softcap > 0) {
    const Tanh<A> h = tanh_lanes(z / A(t.softcap));
    z = h.value * A(t.softcap);
    slope = slope * h.slope;
  }
  return {z / A(t.temperature), slope / A(t.temperature)};
}

template <class T> FA_INLINE const T* logits_of(const Rows& job, int64_t n) { return static_cast<const T*>(job.logits) + job.strides.at(n); }

template <class T, class A, bool PLAIN>
FA_INLINE Vec<A> bias_at(const T* bias, int64_t v, int64_t n) {
  if constexpr (PLAIN) return Vec<A>{};
  return bias == nullptr ? Vec<A>{} : n == Lanes<A>::count ? load_lanes(bias + v) : load_some<T, A>(bias + v, n, A(0));
}

// The transformed logit of one column, by the vector code of the row, so that comparing it with the row's maximum is exact.
template <class T, class A, bool PLAIN>
FA_INLINE Transformed<A, PLAIN> transform_one(const T* x, const T* bias, int64_t v, const Transform& t) {
  return transform<A, PLAIN>(load_some<T, A>(x + v, 1, A(0)), bias_at<T, A, PLAIN>(bias, v, 1), t);
}

// Prefetching 2 KiB ahead, because the hardware prefetcher stops at every 4 KiB page. The statistics of [2048, 49152] fp32 take 38 ms with it
// and 70 without on one core; one bare read (amax) takes 37.
template <class T> FA_INLINE void prefetch(const T* p) { __builtin_prefetch(p + 2048 / sizeof(T)); }

// What a tile of columns adds to a row, with exponentials relative to `reference`.
template <class A> struct Sums {
  Vec<A> max, total, sum, weighted;  // max z, sum z, sum e^d, sum d e^d, with d = z - reference; one column in each lane
};
template <class A> FA_INLINE void add(Sums<A>& s, Vec<A> z, A reference) {
  const Vec<A> d = z - reference, e = exp_lanes(d);
  s.max = max_lanes<A>(s.max, z);
  s.total += z;
  s.sum += e;
  s.weighted += max_lanes<A>(broadcast(A(-1e30)), d) * e;  // -inf * 0 is NaN; -1e30 * 0 is 0
}

template <class T, bool PLAIN>
FA_INLINE Sums<Accumulator<T>> sum_columns(const T* x, const T* bias, int64_t begin, int64_t end, const Transform& t, Accumulator<T> reference) {
  using A = Accumulator<T>;
  constexpr int L = Lanes<A>::count;
  Sums<A> s = {broadcast(-std::numeric_limits<A>::infinity()), {}, {}, {}};
  int64_t v = begin;
  for (; v + L <= end; v += L) {
    prefetch(x + v);
    add<A>(s, transform<A, PLAIN>(load_lanes(x + v), bias_at<T, A, PLAIN>(bias, v, L), t).z, reference);
  }
  if (v < end) {
    Sums<A> tail = s;
    add<A>(tail, transform<A, PLAIN>(load_some<T, A>(x + v, end - v, A(0)), bias_at<T, A, PLAIN>(bias, v, end - v), t).z, reference);
    for (int64_t i = 0; i < end - v; ++i) {
      s.max[i] = tail.max[i];
      s.total[i] = tail.total[i];
      s.sum[i] = tail.sum[i];
      s.weighted[i] = tail.weighted[i];
    }
  }
  return s;
}

// Row n's statistics, N apart in the table. An ignored row is not read and gets zeros.
//
// One pass: exponentials are relative to the maximum of earlier tiles. A tile that rises more than 8 nats above it is summed again while it
// is still in L1.
template <class T, bool PLAIN> static void row_stats(const StatsRows& job, int64_t n) {
  using A = Accumulator<T>;
  const T *x = logits_of<T>(job, n), *bias = static_cast<const T*>(job.bias);
  const int64_t id = job.ids[n], V = job.V, stride = job.N;
  const Transform t = job.transform;
  A* const stats = static_cast<A*>(job.stats) + n;
  constexpr A infinity = std::numeric_limits<A>::infinity();
  if (id < 0) {
    for (int k = 0; k < STATS; ++k) stats[k * stride] = 0;
    return;
  }
  A reference = -infinity, row_max = -infinity;
  double sum = 0, weighted = 0, total = 0;
  for (int64_t begin = 0; begin < V; begin += COLUMN_TILE) {
    const int64_t end = begin + COLUMN_TILE < V ? begin + COLUMN_TILE : V;
    Sums<A> s = sum_columns<T, PLAIN>(x, bias, begin, end, t, reference == -infinity ? A(0) : reference);
    const A tile_max = horizontal_max<A>(s.max);
    total += horizontal_sum<A>(s.total);
    if (tile_max > row_max) row_max = tile_max;
    if (tile_max > reference + 8 || (reference == -infinity && tile_max > reference)) {
      if (sum > 0) {  // rescale the sums from the old reference to the new one
        const double shift = double(reference) - double(tile_max);
        weighted = std::exp(shift) * (weighted + shift * sum);
        sum *= std::exp(shift);
      }
      reference = tile_max;
      s = sum_columns<T, PLAIN>(x, bias, begin, end, t, reference);
    }
    sum += horizontal_sum<A>(s.sum);
    weighted += horizontal_sum<A>(s.weighted);
  }
  const double log_sum = std::log(sum) + (double(reference) - double(row_max));  // relative to the true maximum
  const A at_id = transform_one<T, A, PLAIN>(x, bias, id, t).z[0];
  stats[LOGP * stride] = (at_id - row_max) - A(log_sum);
  stats[MEAN_LOGP * stride] = A(total / V - double(row_max) - log_sum);
  stats[ENTROPY * stride] = A(std::log(sum) - weighted / sum);
  stats[LSE * stride] = A(double(row_max) + log_sum);
  stats[MAX * stride] = row_max;
  stats[LOGSUM * stride] = A(log_sum);
  stats[TOP1 * stride] = at_id == row_max;
}

// Row n's gradient; `out` may be the logits. An ignored row is not read and gets zeros.
template <class T, bool PLAIN> static void row_grad(const GradRows& job, int64_t n) {
  using A = Accumulator<T>;
  constexpr int L = Lanes<A>::count;
  const T *x = logits_of<T>(job, n), *bias = static_cast<const T*>(job.bias);
  const int64_t id = job.ids[n], V = job.V, stride = job.N;
  const Transform t = job.transform;
  const A *stats = static_cast<const A*>(job.stats) + n, *coefficients = static_cast<const A*>(job.coefficients) + n;
  T* const out = static_cast<T*>(job.out) + job.out_strides.at(n);
  if (id < 0) {
    std::memset(out, 0, V * sizeof(T));
    return;
  }
  const A row_max = stats[MAX * stride], logsum = stats[LOGSUM * stride];
  const A onehot = coefficients[ONEHOT * stride], prob = coefficients[PROB * stride];
  const A plogp = coefficients[PLOGP * stride], uniform = coefficients[UNIFORM * stride];
  const auto gradient = [&](const Transformed<A, PLAIN>& at) __attribute__((always_inline)) {
    const Vec<A> logp = (at.z - row_max) - logsum;
    const Vec<A> finite = logp < A(-1e30) ? broadcast(A(-1e30)) : logp;
    return exp_lanes(logp) * (prob + plogp * finite) + uniform;
  };
  const auto chain = [&](const Transformed<A, PLAIN>& at, Vec<A> dz) __attribute__((always_inline)) {
    if constexpr (PLAIN) return dz;
    return dz * at.slope;
  };
  const auto at_id = transform_one<T, A, PLAIN>(x, bias, id, t);  // read before out, which may be x, is written
  const Vec<A> dx_id = chain(at_id, gradient(at_id) + onehot);
  const int64_t whole = V / L * L;
  for (int64_t i = 0; i < whole; i += L) {
    prefetch(x + i);
    const auto at = transform<A, PLAIN>(load_lanes(x + i), bias_at<T, A, PLAIN>(bias, i, L), t);
    store_lanes(out + i, chain(at, gradient(at)));
  }
  if (whole < V) {
    const auto at = transform<A, PLAIN>(load_some<T, A>(x + whole, V - whole, A(0)), bias_at<T, A, PLAIN>(bias, whole, V - whole), t);
    T tail[L];
    store_lanes(tail, chain(at, gradient(at)));
    std::memcpy(out + whole, tail, (V - whole) * sizeof(T));
  }
  T one[L];
  store_lanes(one, dx_id);
  out[id] = one[0];
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
