// The softmax kernels for one instruction set: setup.py compiles this file once per target with -DFASTALIGN_TARGET=<name> and the target's
// flags. targets.h chooses among them at run time, so no binary needs the machine it was built on.
#include "api.h"
#include "columns.h"
#include "rows.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

template <class T> static void stats_rows(const StatsRows& job, int64_t begin, int64_t end) {
  const auto kernel = job.plain() ? row_stats<T, true> : row_stats<T, false>;
  for (int64_t n = begin; n < end; ++n) kernel(job, n);
}

template <class T> static void grad_rows(const GradRows& job, int64_t begin, int64_t end) {
  const auto kernel = job.plain() ? row_grad<T, true> : row_grad<T, false>;
  for (int64_t n = begin; n < end; ++n) kernel(job, n);
}

template <class T> static void sum_columns(const ColumnSums& job, int64_t begin, int64_t end) {
  const auto kernel = job.plain() ? column_sums<T, true> : column_sums<T, false>;
  for (int64_t tile = begin; tile < end; ++tile) kernel(job, tile);
}

template <class T> static void grad_columns(const ColumnGrad& job, int64_t begin, int64_t end) {
  const auto kernel = job.plain() ? column_grad<T, true> : column_grad<T, false>;
  for (int64_t n = begin; n < end; ++n) kernel(job, n);
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
