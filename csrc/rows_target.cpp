// The row kernels for one instruction set: setup.py compiles this file once per target with -DFASTALIGN_TARGET=<name> and the target's flags.
#include "rows.h"
#include "rows_api.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

template <class T> static void stats_rows(const StatsRows& job, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const auto kernel = job.plain() ? row_stats<T, true> : row_stats<T, false>;
  for (int64_t n = begin; n < end; ++n)
    kernel(static_cast<const T*>(job.logits) + job.strides.at(n), static_cast<const T*>(job.bias), job.ids[n], job.V, job.transform,
           static_cast<A*>(job.stats) + n, job.N);
}

template <class T> static void grad_rows(const GradRows& job, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const auto kernel = job.plain() ? row_grad<T, true> : row_grad<T, false>;
  for (int64_t n = begin; n < end; ++n)
    kernel(static_cast<const T*>(job.logits) + job.strides.at(n), static_cast<const T*>(job.bias), job.ids[n], job.V, job.transform,
           static_cast<const A*>(job.stats) + n, static_cast<const A*>(job.coefficients) + n, job.N,
           static_cast<T*>(job.out) + job.out_strides.at(n));
}

template <class T> static void sum_columns(const ColumnSums& job, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const auto kernel = job.plain() ? column_sums<T, true> : column_sums<T, false>;
  for (int64_t s = begin; s < end; ++s)
    kernel(static_cast<const T*>(job.logits), job.strides, static_cast<const T*>(job.bias), job.ids, job.N, s * STRETCH,
           std::min((s + 1) * STRETCH, job.V), job.transform, static_cast<const A*>(job.stats), static_cast<A*>(job.largest),
           static_cast<A*>(job.sums), job.totals + s * 2 * job.N);
}

template <class T> static void grad_columns(const ColumnGrad& job, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const auto kernel = job.plain() ? column_grad<T, true> : column_grad<T, false>;
  for (int64_t n = begin; n < end; ++n)
    kernel(static_cast<const T*>(job.logits) + job.strides.at(n), job.gathered, job.columns, job.K, static_cast<const T*>(job.bias), job.ids[n],
           job.transform, static_cast<const A*>(job.stats) + n, static_cast<const A*>(job.coefficients) + n, job.N,
           static_cast<T*>(job.out) + job.out_strides.at(n), job.totals + n);
}

extern const RowKernels kernels;
const RowKernels kernels = {
    {stats_rows<float>, stats_rows<double>, stats_rows<bf16>, stats_rows<fp16>},
    {grad_rows<float>, grad_rows<double>, grad_rows<bf16>, grad_rows<fp16>},
    {sum_columns<float>, sum_columns<double>, sum_columns<bf16>, sum_columns<fp16>},
    {grad_columns<float>, grad_columns<double>, grad_columns<bf16>, grad_columns<fp16>},
};

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
