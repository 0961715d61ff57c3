// Generalised advantage estimation, backwards in time over the tokens inside the mask; policy/advantages.py has the formula. Torch-free.
#pragma once

#include <cstdint>

namespace fastalign {

template <class A> struct GaeJob {
  const A *rewards, *values;  // [B, T]
  const bool* mask;           // [B, T]; entries outside are not used, and get zeros
  const A* bootstrap;         // [B], or null
  int64_t T;
  double gamma, lam;
  A *advantages, *returns;  // [B, T]
};

// ROWS rows side by side, because each row is one chain of dependent additions. Sums run in fp64.
template <int ROWS, class A> static void gae_rows_from(const GaeJob<A>& job, int64_t row) {
  double running[ROWS] = {}, following[ROWS] = {};
  for (int k = 0; k < ROWS && job.bootstrap != nullptr; ++k) following[k] = double(job.bootstrap[row + k]);
  for (int64_t t = job.T - 1; t >= 0; --t) {
    for (int k = 0; k < ROWS; ++k) {
      const int64_t n = (row + k) * job.T + t;
      const bool inside = job.mask[n];
      const double value = double(job.values[n]);
      const double advantage = double(job.rewards[n]) + job.gamma * following[k] - value + job.gamma * job.lam * running[k];
      job.advantages[n] = inside ? A(advantage) : A(0);
      job.returns[n] = inside ? A(advantage + value) : A(0);
      running[k] = inside ? advantage : running[k];
      following[k] = inside ? value : following[k];
    }
  }
}

template <class A> static void gae_range(const GaeJob<A>& job, int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) gae_rows_from<4>(job, row);
  for (; row < end; ++row) gae_rows_from<1>(job, row);
}

}  // namespace fastalign
