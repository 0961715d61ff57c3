// One row of logits: its statistics in one read, its gradient in one read and one write. Torch-free.
//
//   u = logit_scale * (x + bias);   c = softcap * tanh(u / softcap)  (c = u without softcap);   z = c / temperature
//   logp = z[id] - lse;   mean_logp = mean_v z[v] - lse;   entropy = -sum_v P[v] log P[v];   P[v] = exp(z[v] - lse)
//   dz[v] = onehot * [v == id] + P[v] * (prob + plogp * log P[v]) + uniform;   dx[v] = dz[v] * dz/dx
//
// The four numbers (onehot, prob, plogp, uniform) cover every loss built from the statistics, so there is one gradient kernel.
// lse is kept as (max, logsum) because max + logsum rounds to 1e-3 at |z| = 1e4, which would be a relative error of 1e-3 in P.
//
// Vectors are GCC/Clang vector extensions, 64 bytes wide; the compiler splits them for the target. This header is compiled once
// per target (rows_target.cpp) and chosen at run time, so no binary needs the machine it was built on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "rows_api.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

enum Stat { LOGP, MEAN_LOGP, ENTROPY, LSE, MAX, LOGSUM, TOP1, STATS };
enum Coefficient { ONEHOT, PROB, PLOGP, UNIFORM, COEFFICIENTS };

template <class A> struct Lanes;
template <> struct Lanes<float> {
  static constexpr int count = 16;
  typedef float vec __attribute__((vector_size(64)));
  typedef int32_t ivec __attribute__((vector_size(64)));
  typedef uint32_t uvec __attribute__((vector_size(64)));
};
template <> struct Lanes<double> {
  static constexpr int count = 8;
  typedef double vec __attribute__((vector_size(64)));
  typedef int64_t ivec __attribute__((vector_size(64)));
};
template <class A> using Vec = typename Lanes<A>::vec;

#define FA_INLINE static inline __attribute__((always_inline))

template <class A> FA_INLINE Vec<A> broadcast(A x) { return x - Vec<A>{}; }

// exp for finite or -inf arguments <= ~88, 1.1 ulp: x = n ln2 + r with |r| <= ln2/2, Taylor to r^7 (next term 5e-9), 2^n by exponent bits.
// Arguments below -87 flush to 0 (2^-126 has nothing to add to a sum that holds a 1). NaN passes through every step.
FA_INLINE Vec<float> exp_lanes(Vec<float> x) {
  using V = Vec<float>;
  const V low = broadcast(-87.0f);
  const auto tiny = x < low;
  const V clamped = tiny ? low : x;
  const V shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer in the low bits
  const V n = shifted - 12582912.0f;
  const V r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Lanes<float>::uvec bits;  // unsigned: for arguments outside of the domain the sum wraps, and its value is not used
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;  // the integer n sits in the low mantissa bits
  V scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return tiny ? V{} : p * scale;
}

// fp64 serves gradient checks, not speed: libm lane by lane.
FA_INLINE Vec<double> exp_lanes(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::count; ++i) x[i] = std::exp(x[i]);
  return x;
}

// tanh and its derivative. With t = e^-2|x|: tanh |x| = 1 - 2 t / (1 + t), below 0.25, where that cancels, its odd Taylor series; 2 ulp.
// The derivative is 4 t / (1 + t)^2: (1 - h)(1 + h) of a rounded h near 1 would have no digits left (off by 0.5 % at |x| = 6).
template <class A> struct Tanh {
  Vec<A> value, slope;
};
FA_INLINE Tanh<float> tanh_lanes(Vec<float> x) {
  using V = Vec<float>;
  const V s = x * x;
  V p = broadcast(-1382.0f / 155925);
  p = p * s + 62.0f / 2835;
  p = p * s - 17.0f / 315;
  p = p * s + 2.0f / 15;
  p = p * s - 1.0f / 3;
  const V near = x + x * s * p;
  const V magnitude = x < 0.0f ? -x : x;
  const V t = exp_lanes(-2.0f * magnitude), inverse = 1.0f / (1.0f + t);
  const V far = 1.0f - 2.0f * (t * inverse);
  return {magnitude < 0.25f ? near : (x < 0.0f ? -far : far), 4.0f * t * inverse * inverse};
}
FA_INLINE Tanh<double> tanh_lanes(Vec<double> x) {
  Tanh<double> at;
  for (int i = 0; i < Lanes<double>::count; ++i) {
    const double t = std::exp(-2 * std::fabs(x[i]));
    at.value[i] = std::tanh(x[i]);
    at.slope[i] = 4 * t / ((1 + t) * (1 + t));
  }
  return at;
}

template <class A> FA_INLINE Vec<A> max_lanes(Vec<A> a, Vec<A> b) { return b > a ? b : a; }
// In fp64: fp32 would round a confident row's 1 + 8e-7 three times over, and log(sum), all that is left of its loss, to half.
template <class A> FA_INLINE double horizontal_sum(Vec<A> v) {
  double sum = 0;
  for (int i = 0; i < Lanes<A>::count; ++i) sum += v[i];
  return sum;
}
template <class A> FA_INLINE A horizontal_max(Vec<A> v) {
  A top = v[0];
  for (int i = 1; i < Lanes<A>::count; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// z and dz/dx of a vector of raw logits. PLAIN: no bias, scale, softcap or temperature, the case worth its own code.
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

// n <= Lanes::count values from p, the rest of the vector is `fill`.
template <class T, class A> FA_INLINE Vec<A> load_some(const T* p, int64_t n, A fill) {
  T padded[Lanes<A>::count];
  std::memcpy(padded, p, n * sizeof(T));
  for (int64_t i = n; i < Lanes<A>::count; ++i) padded[i] = T{};
  Vec<A> v = load_lanes(padded);
  for (int64_t i = n; i < Lanes<A>::count; ++i) v[i] = fill;
  return v;
}

template <class T, class A, bool PLAIN>
FA_INLINE Vec<A> bias_at(const T* bias, int64_t v, int64_t n) {
  if constexpr (PLAIN) return Vec<A>{};
  return bias == nullptr ? Vec<A>{} : n == Lanes<A>::count ? load_lanes(bias + v) : load_some<T, A>(bias + v, n, A(0));
}

// The transformed logit of one column, through the same vector code as its row so that comparing it with the row's maximum is exact.
template <class T, class A, bool PLAIN>
FA_INLINE Transformed<A, PLAIN> transform_one(const T* x, const T* bias, int64_t v, const Transform& t) {
  return transform<A, PLAIN>(load_some<T, A>(x + v, 1, A(0)), bias_at<T, A, PLAIN>(bias, v, 1), t);
}

// Asking 2 KiB ahead takes the statistics of [2048, 49152] fp32 from 70 ms to 38 on one core, where one bare read (amax) takes 37: the
// hardware prefetcher stops at every 4 KiB page.
template <class T> FA_INLINE void prefetch(const T* p) { __builtin_prefetch(p + 2048 / sizeof(T)); }

// What a stretch of columns adds to a row, with exponentials taken relative to `reference`.
template <class A> struct Sums {
  Vec<A> top, total, sum, weighted;  // max z, sum z, sum e^d, sum d e^d, with d = z - reference, a column a lane
};
template <class A> FA_INLINE void add(Sums<A>& s, Vec<A> z, A reference) {
  const Vec<A> d = z - reference, e = exp_lanes(d);
  s.top = max_lanes<A>(s.top, z);
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
      s.top[i] = tail.top[i];
      s.total[i] = tail.total[i];
      s.sum[i] = tail.sum[i];
      s.weighted[i] = tail.weighted[i];
    }
  }
  return s;
}

// stats[k * stats_stride] for k in Stat; a negative id means an ignored row, which is not read and gets zeros.
//
// One pass: the exponentials are taken relative to a maximum seen earlier, and a stretch that rises more than 8 nats above it is summed
// again while it is still in L1.
template <class T, bool PLAIN>
static void row_stats(const T* x, const T* bias, int64_t id, int64_t V, const Transform& t, Accumulator<T>* stats, int64_t stats_stride) {
  using A = Accumulator<T>;
  constexpr A infinity = std::numeric_limits<A>::infinity();
  if (id < 0) {
    for (int k = 0; k < STATS; ++k) stats[k * stats_stride] = 0;
    return;
  }
  A reference = -infinity, top = -infinity;
  double sum = 0, weighted = 0, total = 0;
  for (int64_t begin = 0; begin < V; begin += STRETCH) {
    const int64_t end = begin + STRETCH < V ? begin + STRETCH : V;
    Sums<A> s = sum_columns<T, PLAIN>(x, bias, begin, end, t, reference == -infinity ? A(0) : reference);
    const A stretch_top = horizontal_max<A>(s.top);
    total += horizontal_sum<A>(s.total);
    if (stretch_top > top) top = stretch_top;
    if (stretch_top > reference + 8 || (reference == -infinity && stretch_top > reference)) {
      if (sum > 0) {  // shift what has been summed so far from the old reference to the new one
        const double shift = double(reference) - double(stretch_top);
        weighted = std::exp(shift) * (weighted + shift * sum);
        sum *= std::exp(shift);
      }
      reference = stretch_top;
      s = sum_columns<T, PLAIN>(x, bias, begin, end, t, reference);
    }
    sum += horizontal_sum<A>(s.sum);
    weighted += horizontal_sum<A>(s.weighted);
  }
  const double log_sum = std::log(sum) + (double(reference) - double(top));  // relative to the true maximum
  const A at_id = transform_one<T, A, PLAIN>(x, bias, id, t).z[0];
  stats[LOGP * stats_stride] = (at_id - top) - A(log_sum);
  stats[MEAN_LOGP * stats_stride] = A(total / V - double(top) - log_sum);
  stats[ENTROPY * stats_stride] = A(std::log(sum) - weighted / sum);
  stats[LSE * stats_stride] = A(double(top) + log_sum);
  stats[MAX * stats_stride] = top;
  stats[LOGSUM * stats_stride] = A(log_sum);
  stats[TOP1 * stats_stride] = at_id == top;
}

// out may be x itself. Rows with a negative id are not read and get zeros.
template <class T, bool PLAIN>
static void row_grad(const T* x, const T* bias, int64_t id, int64_t V, const Transform& t, const Accumulator<T>* stats,
                     const Accumulator<T>* coefficients, int64_t stride, T* out) {
  using A = Accumulator<T>;
  constexpr int L = Lanes<A>::count;
  if (id < 0) {
    std::memset(out, 0, V * sizeof(T));
    return;
  }
  const A top = stats[MAX * stride], logsum = stats[LOGSUM * stride];
  const A onehot = coefficients[ONEHOT * stride], prob = coefficients[PROB * stride];
  const A plogp = coefficients[PLOGP * stride], uniform = coefficients[UNIFORM * stride];
  const auto gradient = [&](const Transformed<A, PLAIN>& at) __attribute__((always_inline)) {
    const Vec<A> logp = (at.z - top) - logsum;
    const Vec<A> finite = logp < A(-1e30) ? broadcast(A(-1e30)) : logp;
    return exp_lanes(logp) * (prob + plogp * finite) + uniform;
  };
  const auto chain = [&](const Transformed<A, PLAIN>& at, Vec<A> dz) __attribute__((always_inline)) {
    if constexpr (PLAIN) return dz;
    return dz * at.slope;
  };
  const auto at_id = transform_one<T, A, PLAIN>(x, bias, id, t);  // before out, which may be x, is written
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

// A row's gradient at K of its columns, but for `uniform`; and over these the sums of P dz/dx and of P log P dz/dx, `stride` apart.
template <class T, bool PLAIN>
static void column_grad(const T* x, bool gathered, const int64_t* columns, int64_t K, const T* bias, int64_t id, const Transform& t,
                        const Accumulator<T>* stats, const Accumulator<T>* coefficients, int64_t stride, T* out, double* totals) {
  using A = Accumulator<T>;
  constexpr int L = Lanes<A>::count;
  totals[0] = totals[stride] = 0;
  if (id < 0) {
    std::memset(out, 0, K * sizeof(T));
    return;
  }
  const A top = stats[MAX * stride], logsum = stats[LOGSUM * stride];
  const A prob = coefficients[PROB * stride], plogp = coefficients[PLOGP * stride];
  for (int64_t begin = 0; begin < K; begin += STRETCH) {
    const int64_t end = std::min(begin + STRETCH, K);
    Vec<A> mass = {}, weighted = {};
    const auto some = [&](int64_t k, auto count) __attribute__((always_inline)) {  // `count` is known to the compiler but for the last ones
      T own[L] = {}, own_bias[L] = {}, dx[L];
      if (gathered) std::memcpy(own, x + k, count * sizeof(T));
      else
        for (int i = 0; i < count; ++i) own[i] = x[columns[k + i]];
      if (!PLAIN && bias != nullptr)
        for (int i = 0; i < count; ++i) own_bias[i] = bias[columns[k + i]];
      const auto at = transform<A, PLAIN>(load_lanes(own), load_lanes(own_bias), t);
      const Vec<A> logp = max_lanes<A>(broadcast(A(-1e30)), (at.z - top) - logsum);
      Vec<A> share = exp_lanes(logp);
      if constexpr (!PLAIN) share = share * at.slope;
      store_lanes(dx, share * (prob + plogp * logp));
      std::memcpy(out + k, dx, count * sizeof(T));
      for (int i = count; i < L; ++i) share[i] = 0;
      mass += share;
      weighted += logp * share;
    };
    int64_t k = begin;
    for (; k + L <= end; k += L) some(k, std::integral_constant<int, L>());
    if (k < end) some(k, int(end - k));
    totals[0] += horizontal_sum<A>(mass);
    totals[stride] += horizontal_sum<A>(weighted);
  }
  const int64_t* found = std::lower_bound(columns, columns + K, id);
  if (found == columns + K || *found != id) return;
  const int64_t k = found - columns;
  const auto at = transform<A, PLAIN>(load_some<T, A>(x + (gathered ? k : id), 1, A(0)), bias_at<T, A, PLAIN>(bias, id, 1), t);
  const Vec<A> logp = max_lanes<A>(broadcast(A(-1e30)), (at.z - top) - logsum);
  Vec<A> dx = exp_lanes(logp) * (prob + plogp * logp) + coefficients[ONEHOT * stride];
  if constexpr (!PLAIN) dx = dx * at.slope;
  T one[L];
  store_lanes(one, dx);
  out[k] = one[0];
}

// Of the columns [begin, end) of N rows: largest P and the sum of P dz/dx of each column; of each row over these columns, the sums of P dz/dx and
// of P log P dz/dx. Rows with a negative id are not read. A stretch of columns at a time, so that its sums stay in L1 while all rows pass.
template <class T, bool PLAIN>
static void column_sums(const T* x, const Strides& strides, const T* bias, const int64_t* ids, int64_t N, int64_t begin, int64_t end,
                        const Transform& t, const Accumulator<T>* stats, Accumulator<T>* largest, Accumulator<T>* sums, double* totals) {
  using A = Accumulator<T>;
  constexpr int L = Lanes<A>::count;
  std::fill(largest + begin, largest + end, A(0));
  std::fill(sums + begin, sums + end, A(0));
  for (int64_t n = 0; n < N; ++n) {
    totals[n] = totals[N + n] = 0;
    if (ids[n] < 0) continue;
    const T* row = x + strides.at(n);
    const A top = stats[MAX * N + n], logsum = stats[LOGSUM * N + n];
    Vec<A> mass = {}, weighted = {};
    const auto share = [&](const Transformed<A, PLAIN>& at, Vec<A>& p, Vec<A>& logp) __attribute__((always_inline)) {
      logp = (at.z - top) - logsum;
      p = exp_lanes(logp);
      logp = max_lanes<A>(broadcast(A(-1e30)), logp);
      if constexpr (PLAIN) return p;
      return p * at.slope;
    };
    Vec<A> p, logp;
    int64_t v = begin;
    for (; v + L <= end; v += L) {
      prefetch(row + v);
      const Vec<A> own = share(transform<A, PLAIN>(load_lanes(row + v), bias_at<T, A, PLAIN>(bias, v, L), t), p, logp);
      store_lanes(largest + v, max_lanes<A>(load_lanes(largest + v), p));
      store_lanes(sums + v, load_lanes(sums + v) + own);
      mass += own;
      weighted += logp * own;
    }
    if (v < end) {
      const Vec<A> own = share(transform<A, PLAIN>(load_some<T, A>(row + v, end - v, A(0)), bias_at<T, A, PLAIN>(bias, v, end - v), t), p, logp);
      for (int64_t i = 0; i < end - v; ++i) {
        if (p[i] > largest[v + i]) largest[v + i] = p[i];
        sums[v + i] += own[i];
        mass[i] += own[i];
        weighted[i] += logp[i] * own[i];
      }
    }
    totals[n] = horizontal_sum<A>(mass);
    totals[N + n] = horizontal_sum<A>(weighted);
  }
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
