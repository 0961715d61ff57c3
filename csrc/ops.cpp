// Registration and checked launchers of the native row kernels for CPUs, on torch's stable ABI (torch >= 2.10).
#define FASTALIGN_TARGET generic
#include "rows_api.h"
#include "targets.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

namespace fastalign {
FASTALIGN_DECLARE_KERNELS(RowKernels, kernels)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return F32;
    case ScalarType::Double: return F64;
    case ScalarType::BFloat16: return BF16;
    case ScalarType::Half: return F16;
    default: STD_TORCH_CHECK(false, "logits: fp32, fp64, bf16 or fp16 wanted"); return DTYPES;
  }
}

ScalarType accumulator_of(const Tensor& t) { return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

void check_table(const Tensor& t, const char* name, int64_t rows, int64_t N, ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == N && t.is_contiguous(), name, ": contiguous [", rows, ", ", N, "] wanted");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": fp32 wanted, or fp64 with fp64 logits");
}

Strides strides_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 3 && (t.size(2) <= 1 || t.stride(2) == 1), name, ": [B, T, V] with unit stride over V wanted");
  return {t.size(1), t.stride(0), t.stride(1)};
}

// vocab_size: where the logits are of some of the columns.
Rows rows_of(const Tensor& logits, const Tensor& ids, const std::optional<Tensor>& bias, double logit_scale, double softcap, double temperature,
             std::optional<int64_t> vocab_size = {}) {
  const Strides strides = strides_of(logits, "logits");
  const int64_t N = logits.size(0) * logits.size(1), V = vocab_size.value_or(logits.size(2));
  STD_TORCH_CHECK(ids.dim() == 1 && ids.size(0) == N && ids.is_contiguous() && ids.scalar_type() == ScalarType::Long, "ids: contiguous int64 [B*T] wanted");
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == V && bias->is_contiguous() && bias->scalar_type() == logits.scalar_type(),
                    "bias: contiguous [V] of the logits' dtype wanted");
  }
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t n = 0; n < N; ++n) STD_TORCH_CHECK(id[n] < V, "ids[", n, "] is ", id[n], ", outside [0, ", V, ")");
  return {logits.const_data_ptr(), strides, bias ? bias->const_data_ptr() : nullptr, id, N, V, {logit_scale, softcap, temperature}};
}

void row_stats(Tensor logits, Tensor ids, std::optional<Tensor> bias, double logit_scale, double softcap, double temperature, Tensor stats) {
  const Rows rows = rows_of(logits, ids, bias, logit_scale, softcap, temperature);
  check_table(stats, "stats", 7, rows.N, accumulator_of(logits));
  const StatsRows job{rows, stats.mutable_data_ptr()};
  const auto kernel = FASTALIGN_KERNELS(kernels).stats[dtype_of(logits)];
  torch::stable::parallel_for(0, rows.N, 1, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

void row_grad(Tensor logits, Tensor ids, std::optional<Tensor> bias, double logit_scale, double softcap, double temperature, Tensor stats,
              Tensor coefficients, Tensor out) {
  const Rows rows = rows_of(logits, ids, bias, logit_scale, softcap, temperature);
  check_table(stats, "stats", 7, rows.N, accumulator_of(logits));
  check_table(coefficients, "coefficients", 4, rows.N, accumulator_of(logits));
  const Strides out_strides = strides_of(out, "out");
  STD_TORCH_CHECK(out.size(0) == logits.size(0) && out.size(1) == logits.size(1) && out.size(2) == rows.V && out.scalar_type() == logits.scalar_type(),
                  "out: the logits' shape and dtype wanted");
  const GradRows job{rows, stats.const_data_ptr(), coefficients.const_data_ptr(), out.mutable_data_ptr(), out_strides};
  const auto kernel = FASTALIGN_KERNELS(kernels).grad[dtype_of(logits)];
  torch::stable::parallel_for(0, rows.N, 1, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

void check_vector(const Tensor& t, const char* name, int64_t V, ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == V && t.is_contiguous() && t.scalar_type() == dtype, name, ": contiguous [", V, "] wanted");
}

void column_sums(Tensor logits, Tensor ids, std::optional<Tensor> bias, double logit_scale, double softcap, double temperature, Tensor stats,
                 Tensor largest, Tensor sums, Tensor totals) {
  const Rows rows = rows_of(logits, ids, bias, logit_scale, softcap, temperature);
  check_table(stats, "stats", 7, rows.N, accumulator_of(logits));
  check_vector(largest, "largest", rows.V, accumulator_of(logits));
  check_vector(sums, "sums", rows.V, accumulator_of(logits));
  check_table(totals, "totals", 2, rows.N, ScalarType::Double);
  const int64_t stretches = (rows.V + STRETCH - 1) / STRETCH, size = 2 * rows.N;
  std::vector<double> parts(stretches * size);
  const ColumnSums job{rows, stats.const_data_ptr(), largest.mutable_data_ptr(), sums.mutable_data_ptr(), parts.data()};
  const auto kernel = FASTALIGN_KERNELS(kernels).columns[dtype_of(logits)];
  torch::stable::parallel_for(0, stretches, 1, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  double* total = static_cast<double*>(totals.mutable_data_ptr());
  std::fill(total, total + size, 0.0);
  for (int64_t i = 0; i < stretches * size; ++i) total[i % size] += parts[i];
}

void column_grad(Tensor logits, Tensor columns, Tensor ids, std::optional<Tensor> bias, double logit_scale, double softcap, double temperature,
                 Tensor stats, Tensor coefficients, int64_t vocab_size, Tensor out, Tensor totals) {
  const Rows rows = rows_of(logits, ids, bias, logit_scale, softcap, temperature, vocab_size);
  const int64_t K = columns.numel();
  STD_TORCH_CHECK(columns.dim() == 1 && columns.is_contiguous() && columns.scalar_type() == ScalarType::Long, "columns: contiguous int64 [K] wanted");
  STD_TORCH_CHECK(logits.size(2) == K || logits.size(2) == vocab_size, "logits: of all columns or of the K ones wanted");
  const int64_t* column = static_cast<const int64_t*>(columns.const_data_ptr());
  for (int64_t k = 0; k < K; ++k)
    STD_TORCH_CHECK(column[k] >= (k ? column[k - 1] + 1 : 0) && column[k] < vocab_size, "columns: ascending and below ", vocab_size, " wanted");
  check_table(stats, "stats", 7, rows.N, accumulator_of(logits));
  check_table(coefficients, "coefficients", 4, rows.N, accumulator_of(logits));
  check_table(totals, "totals", 2, rows.N, ScalarType::Double);
  const Strides out_strides = strides_of(out, "out");
  STD_TORCH_CHECK(out.size(0) == logits.size(0) && out.size(1) == logits.size(1) && out.size(2) == K && out.scalar_type() == logits.scalar_type(),
                  "out: [B, T, K] of the logits' dtype wanted");
  const ColumnGrad job{rows, column, K, logits.size(2) == K, stats.const_data_ptr(), coefficients.const_data_ptr(), out.mutable_data_ptr(), out_strides,
                       static_cast<double*>(totals.mutable_data_ptr())};
  const auto kernel = FASTALIGN_KERNELS(kernels).column_grad[dtype_of(logits)];
  torch::stable::parallel_for(0, rows.N, 1, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

int64_t cpu_target() { return chosen_target(); }
bool cpu_own_gemm() { return own_gemm(); }

}  // namespace
}  // namespace fastalign

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign, m) {
  m.def("row_stats(Tensor logits, Tensor ids, Tensor? bias, float logit_scale, float softcap, float temperature, Tensor(a!) stats) -> ()");
  m.def("row_grad(Tensor logits, Tensor ids, Tensor? bias, float logit_scale, float softcap, float temperature, Tensor stats, "
        "Tensor coefficients, Tensor(a!) out) -> ()");
  m.def("column_sums(Tensor logits, Tensor ids, Tensor? bias, float logit_scale, float softcap, float temperature, Tensor stats, "
        "Tensor(a!) largest, Tensor(b!) sums, Tensor(c!) totals) -> ()");
  m.def("column_grad(Tensor logits, Tensor columns, Tensor ids, Tensor? bias, float logit_scale, float softcap, float temperature, Tensor stats, "
        "Tensor coefficients, int vocab_size, Tensor(a!) out, Tensor(b!) totals) -> ()");
  m.def("cpu_target() -> int");
  m.def("cpu_own_gemm() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign, CPU, m) {
  m.impl("row_stats", TORCH_BOX(&fastalign::row_stats));
  m.impl("row_grad", TORCH_BOX(&fastalign::row_grad));
  m.impl("column_sums", TORCH_BOX(&fastalign::column_sums));
  m.impl("column_grad", TORCH_BOX(&fastalign::column_grad));
}

STABLE_TORCH_LIBRARY_IMPL(fastalign, CompositeExplicitAutograd, m) {
  m.impl("cpu_target", TORCH_BOX(&fastalign::cpu_target));
  m.impl("cpu_own_gemm", TORCH_BOX(&fastalign::cpu_own_gemm));
}
