// Checked launchers of the softmax kernels for CPUs, on torch's stable ABI (torch >= 2.10).
#define FASTALIGN_TARGET generic
#include "launch.h"

#include <algorithm>
#include <vector>

#include "api.h"

namespace fastalign {
FASTALIGN_DECLARE_KERNELS(RowKernels, kernels)

namespace {

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return F32;
    case ScalarType::Double: return F64;
    case ScalarType::BFloat16: return BF16;
    case ScalarType::Half: return F16;
    default: expect(false, "logits", t, "fp32, fp64, bf16 or fp16"); return DTYPES;
  }
}

ScalarType accumulator_of(const Tensor& t) { return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

void check_table(const Tensor& t, const char* name, int64_t rows, int64_t N, ScalarType dtype) {
  expect(t.dim() == 2 && t.size(0) == rows && t.size(1) == N && t.is_contiguous() && t.scalar_type() == dtype, name, t, "contiguous ",
         dtype_name(dtype), " [", rows, ", ", N, "]");
}

void check_vector(const Tensor& t, const char* name, int64_t V, ScalarType dtype) {
  expect(t.dim() == 1 && t.size(0) == V && t.is_contiguous() && t.scalar_type() == dtype, name, t, "contiguous ", dtype_name(dtype), " [", V, "]");
}

Strides strides_of(const Tensor& t, const char* name) {
  expect(t.dim() == 3 && (t.size(2) <= 1 || t.stride(2) == 1), name, t, "[B, T, V] with unit stride over V");
  return {t.size(1), t.stride(0), t.stride(1)};
}

Strides out_strides_of(const Tensor& out, const Tensor& logits, int64_t columns) {
  const Strides strides = strides_of(out, "out");
  expect(out.size(0) == logits.size(0) && out.size(1) == logits.size(1) && out.size(2) == columns && out.scalar_type() == logits.scalar_type(), "out",
         out, dtype_name(logits.scalar_type()), " [", logits.size(0), ", ", logits.size(1), ", ", columns, "]");
  return strides;
}

Rows rows_of(const Tensor& logits, int64_t V, const Tensor& ids, const std::optional<Tensor>& bias, const Transform& transform) {
  const Strides strides = strides_of(logits, "logits");
  const int64_t N = logits.size(0) * logits.size(1);
  check_vector(ids, "ids", N, ScalarType::Long);
  if (bias) check_vector(*bias, "bias", V, logits.scalar_type());
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t n = 0; n < N; ++n) STD_TORCH_CHECK(id[n] < V, "ids: got ", id[n], " at ", n, ", expected ids below ", V);
  return {logits.const_data_ptr(), strides, bias ? bias->const_data_ptr() : nullptr, id, N, V, transform};
}

template <class Job> void run_rows(void (*kernel)(const Job&, int64_t, int64_t), const Job& job) {
  torch::stable::parallel_for(0, job.N, 1, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

}  // namespace

void row_stats(Tensor logits, Tensor ids, std::optional<Tensor> bias, double logit_scale, double softcap, double temperature, Tensor stats) {
  strides_of(logits, "logits");
  const Rows rows = rows_of(logits, logits.size(2), ids, bias, {logit_scale, softcap, temperature});
  check_table(stats, "stats", 7, rows.N, accumulator_of(logits));
  run_rows(FASTALIGN_KERNELS(kernels).stats[dtype_of(logits)], StatsRows{rows, stats.mutable_data_ptr()});
}

void row_grad(Tensor logits, Tensor ids, std::optional<Tensor> bias, double logit_scale, double softcap, double temperature, Tensor stats,
              Tensor coefficients, Tensor out) {
  strides_of(logits, "logits");
  const Rows rows = rows_of(logits, logits.size(2), ids, bias, {logit_scale, softcap, temperature});
  check_table(stats, "stats", 7, rows.N, accumulator_of(logits));
  check_table(coefficients, "coefficients", 4, rows.N, accumulator_of(logits));
  const Strides out_strides = out_strides_of(out, logits, rows.V);
  run_rows(FASTALIGN_KERNELS(kernels).grad[dtype_of(logits)],
           GradRows{rows, stats.const_data_ptr(), coefficients.const_data_ptr(), out.mutable_data_ptr(), out_strides});
}

void column_sums(Tensor logits, Tensor ids, std::optional<Tensor> bias, double logit_scale, double softcap, double temperature, Tensor stats,
                 Tensor largest, Tensor sums, Tensor totals) {
  strides_of(logits, "logits");
  const Rows rows = rows_of(logits, logits.size(2), ids, bias, {logit_scale, softcap, temperature});
  check_table(stats, "stats", 7, rows.N, accumulator_of(logits));
  check_vector(largest, "largest", rows.V, accumulator_of(logits));
  check_vector(sums, "sums", rows.V, accumulator_of(logits));
  check_table(totals, "totals", 2, rows.N, ScalarType::Double);
  const int64_t tiles = (rows.V + COLUMN_TILE - 1) / COLUMN_TILE, size = 2 * rows.N;
  std::vector<double> parts(tiles * size);
  const ColumnSums job{rows, stats.const_data_ptr(), largest.mutable_data_ptr(), sums.mutable_data_ptr(), parts.data()};
  const auto kernel = FASTALIGN_KERNELS(kernels).columns[dtype_of(logits)];
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  double* total = static_cast<double*>(totals.mutable_data_ptr());
  std::fill(total, total + size, 0.0);
  for (int64_t i = 0; i < tiles * size; ++i) total[i % size] += parts[i];  // in the order of the tiles, whatever the threads
}

void column_grad(Tensor logits, Tensor columns, Tensor ids, std::optional<Tensor> bias, double logit_scale, double softcap, double temperature,
                 Tensor stats, Tensor coefficients, int64_t vocab_size, Tensor out, Tensor totals) {
  const Rows rows = rows_of(logits, vocab_size, ids, bias, {logit_scale, softcap, temperature});
  const int64_t K = columns.numel();
  check_vector(columns, "columns", K, ScalarType::Long);
  expect(logits.size(2) == K || logits.size(2) == vocab_size, "logits", logits, "[B, T, ", vocab_size, "], or the ", K, " columns of it");
  const int64_t* column = static_cast<const int64_t*>(columns.const_data_ptr());
  for (int64_t k = 0; k < K; ++k)
    STD_TORCH_CHECK(column[k] >= (k ? column[k - 1] + 1 : 0) && column[k] < vocab_size, "columns: got ", column[k], " at ", k,
                    ", expected ascending columns below ", vocab_size);
  check_table(stats, "stats", 7, rows.N, accumulator_of(logits));
  check_table(coefficients, "coefficients", 4, rows.N, accumulator_of(logits));
  check_table(totals, "totals", 2, rows.N, ScalarType::Double);
  const Strides out_strides = out_strides_of(out, logits, K);
  run_rows(FASTALIGN_KERNELS(kernels).column_grad[dtype_of(logits)],
           ColumnGrad{rows, column, K, logits.size(2) == K, stats.const_data_ptr(), coefficients.const_data_ptr(), out.mutable_data_ptr(), out_strides,
                      static_cast<double*>(totals.mutable_data_ptr())});
}

}  // namespace fastalign
