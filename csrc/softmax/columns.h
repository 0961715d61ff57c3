// tail_eps: sums over the columns of a block of logits, and the gradient at the columns that are kept. softmax/columns.py has the formulas.
// Torch-free.
#pragma once

#include <algorithm>
#include <type_traits>

#include "rows.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

// Row n's gradient at the K kept columns without its `uniform` part, and over these columns the sums of P dz/dx and of P log P dz/dx.
template <class T, bool PLAIN> static void column_grad(const ColumnGrad& job, int64_t n) {
  using A = Accumulator<T>;
  constexpr int L = Lanes<A>::count;
  const T *x = logits_of<T>(job, n), *bias = static_cast<const T*>(job.bias);
  const int64_t id = job.ids[n], K = job.K, stride = job.N;
  const int64_t* const columns = job.columns;
  const bool gathered = job.gathered;
  const Transform t = job.transform;
  const A *stats = static_cast<const A*>(job.stats) + n, *coefficients = static_cast<const A*>(job.coefficients) + n;
  T* const out = static_cast<T*>(job.out) + job.out_strides.at(n);
  double* const totals = job.totals + n;
  totals[0] = totals[stride] = 0;
  if (id < 0) {
    std::memset(out, 0, K * sizeof(T));
    return;
  }
  const A row_max = stats[MAX * stride], logsum = stats[LOGSUM * stride];
  const A prob = coefficients[PROB * stride], plogp = coefficients[PLOGP * stride];
  for (int64_t begin = 0; begin < K; begin += COLUMN_TILE) {
    const int64_t end = std::min(begin + COLUMN_TILE, K);
    Vec<A> mass = {}, weighted = {};
    const auto some = [&](int64_t k, auto count) __attribute__((always_inline)) {  // `count` is a compile-time constant except for the last vector
      T kept[L] = {}, kept_bias[L] = {}, dx[L];
      if (gathered) std::memcpy(kept, x + k, count * sizeof(T));
      else
        for (int i = 0; i < count; ++i) kept[i] = x[columns[k + i]];
      if (!PLAIN && bias != nullptr)
        for (int i = 0; i < count; ++i) kept_bias[i] = bias[columns[k + i]];
      const auto at = transform<A, PLAIN>(load_lanes(kept), load_lanes(kept_bias), t);
      const Vec<A> logp = max_lanes<A>(broadcast(A(-1e30)), (at.z - row_max) - logsum);
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
  const Vec<A> logp = max_lanes<A>(broadcast(A(-1e30)), (at.z - row_max) - logsum);
  Vec<A> dx = exp_lanes(logp) * (prob + plogp * logp) + coefficients[ONEHOT * stride];
  if constexpr (!PLAIN) dx = dx * at.slope;
  T one[L];
  store_lanes(one, dx);
  out[k] = one[0];
}

// Over all rows, each column's largest P and sum of P dz/dx; over this tile's columns, each row's sums of P dz/dx and of P log P dz/dx.
// Ignored rows are not read. The tile's sums stay in L1 while all rows pass.
template <class T, bool PLAIN> static void column_sums(const ColumnSums& job, int64_t tile) {
  using A = Accumulator<T>;
  constexpr int L = Lanes<A>::count;
  const T* const bias = static_cast<const T*>(job.bias);
  const int64_t N = job.N, begin = tile * COLUMN_TILE, end = std::min(begin + COLUMN_TILE, job.V);
  const Transform t = job.transform;
  const A* const stats = static_cast<const A*>(job.stats);
  A *const largest = static_cast<A*>(job.largest), *const sums = static_cast<A*>(job.sums);
  double* const totals = job.totals + tile * 2 * N;
  std::fill(largest + begin, largest + end, A(0));
  std::fill(sums + begin, sums + end, A(0));
  for (int64_t n = 0; n < N; ++n) {
    totals[n] = totals[N + n] = 0;
    if (job.ids[n] < 0) continue;
    const T* row = logits_of<T>(job, n);
    const A row_max = stats[MAX * N + n], logsum = stats[LOGSUM * N + n];
    Vec<A> mass = {}, weighted = {};
    const auto share = [&](const Transformed<A, PLAIN>& at, Vec<A>& p, Vec<A>& logp) __attribute__((always_inline)) {
      logp = (at.z - row_max) - logsum;
      p = exp_lanes(logp);
      logp = max_lanes<A>(broadcast(A(-1e30)), logp);
      if constexpr (PLAIN) return p;
      return p * at.slope;
    };
    Vec<A> p, logp;
    int64_t v = begin;
    for (; v + L <= end; v += L) {
      prefetch(row + v);
      const Vec<A> mass_at = share(transform<A, PLAIN>(load_lanes(row + v), bias_at<T, A, PLAIN>(bias, v, L), t), p, logp);
      store_lanes(largest + v, max_lanes<A>(load_lanes(largest + v), p));
      store_lanes(sums + v, load_lanes(sums + v) + mass_at);
      mass += mass_at;
      weighted += logp * mass_at;
    }
    if (v < end) {
      const Vec<A> mass_at = share(transform<A, PLAIN>(load_some<T, A>(row + v, end - v, A(0)), bias_at<T, A, PLAIN>(bias, v, end - v), t), p, logp);
      for (int64_t i = 0; i < end - v; ++i) {
        if (p[i] > largest[v + i]) largest[v + i] = p[i];
        sums[v + i] += mass_at[i];
        mass[i] += mass_at[i];
        weighted[i] += logp[i] * mass_at[i];
      }
    }
    totals[n] = horizontal_sum<A>(mass);
    totals[N + n] = horizontal_sum<A>(weighted);
  }
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
