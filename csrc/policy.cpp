// Registration and checked launchers of the losses of policy optimisation and of GAE for CPUs, on torch's stable ABI.
#define FASTALIGN_TARGET generic
#include "advantage.h"
#include "policy_api.h"
#include "targets.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <vector>

namespace fastalign {
FASTALIGN_DECLARE_KERNELS(PolicyKernels, policy_kernels)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t BLOCK = 2048;  // tokens whose sums are taken together, whatever the threads

bool is_double(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, name, ": fp32 or fp64 wanted");
  return t.scalar_type() == ScalarType::Double;
}

void check_like(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(t.numel() == like.numel() && t.dim() == like.dim() && t.is_contiguous() && t.scalar_type() == like.scalar_type(), name,
                  ": contiguous, of the first input's shape and dtype wanted");
}

Tokens tokens_of(const Tensor& mask, const Tensor& scale, const Tensor& like) {
  STD_TORCH_CHECK(mask.dim() == 1 && mask.numel() == like.numel() && mask.is_contiguous() && mask.scalar_type() == ScalarType::Bool,
                  "mask: contiguous bool [N] wanted");
  STD_TORCH_CHECK(scale.dim() == 1 && (scale.numel() == 1 || scale.numel() == like.numel()) && scale.is_contiguous() &&
                      scale.scalar_type() == like.scalar_type(),
                  "scale: contiguous [1] or [N], of the first input's dtype wanted");
  return {static_cast<const bool*>(mask.const_data_ptr()), scale.const_data_ptr(), scale.numel() > 1};
}

const void* data_of(const std::optional<Tensor>& t, const char* name, const Tensor& like) {
  if (!t) return nullptr;
  check_like(*t, name, like);
  return t->const_data_ptr();
}

// Sums of fixed blocks, added up in their order: the same bits for every number of threads.
template <class Kernel> void sum_blocks(int64_t N, int64_t count, const Tensor& sums, Kernel kernel) {
  STD_TORCH_CHECK(sums.dim() == 1 && sums.size(0) == count && sums.scalar_type() == ScalarType::Double && sums.is_contiguous(), "sums: fp64 [", count,
                  "] wanted");
  const int64_t blocks = (N + BLOCK - 1) / BLOCK;
  std::vector<double> parts(blocks * count);
  torch::stable::parallel_for(0, blocks, 4, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) kernel(b * BLOCK, b + 1 < blocks ? (b + 1) * BLOCK : N, parts.data() + b * count);
  });
  double* out = static_cast<double*>(sums.mutable_data_ptr());
  for (int64_t k = 0; k < count; ++k) {
    out[k] = 0;
    for (int64_t b = 0; b < blocks; ++b) out[k] += parts[b * count + k];
  }
}

void policy_tokens(Tensor logp, Tensor old_logp, Tensor advantages, Tensor mask, Tensor scale, std::optional<Tensor> entropy,
                   std::optional<Tensor> reference_logp, double lower, double upper, double dual, double entropy_coefficient, double kl_coefficient,
                   int64_t kl_estimator, Tensor sums, Tensor slopes) {
  const bool wide = is_double(logp, "logp");
  STD_TORCH_CHECK(logp.dim() == 1 && logp.is_contiguous(), "logp: contiguous [N] wanted");
  check_like(old_logp, "old_logp", logp);
  check_like(advantages, "advantages", logp);
  STD_TORCH_CHECK(slopes.dim() == 2 && slopes.size(0) >= 1 && slopes.size(0) <= 2 && slopes.size(1) == logp.numel() && slopes.is_contiguous() &&
                      slopes.scalar_type() == logp.scalar_type(),
                  "slopes: contiguous [1, N] or [2, N] of logp's dtype wanted");
  char* first = static_cast<char*>(slopes.mutable_data_ptr());
  STD_TORCH_CHECK(kl_estimator >= 0 && kl_estimator < KL_ESTIMATORS, "kl_estimator: an index below ", int64_t(KL_ESTIMATORS), " wanted");
  const PolicyJob job{tokens_of(mask, scale, logp),
                      logp.const_data_ptr(),
                      old_logp.const_data_ptr(),
                      advantages.const_data_ptr(),
                      data_of(entropy, "entropy", logp),
                      data_of(reference_logp, "reference_logp", logp),
                      lower,
                      upper,
                      dual,
                      entropy_coefficient,
                      kl_coefficient,
                      kl_estimator,
                      first,
                      slopes.size(0) > 1 ? first + logp.numel() * (wide ? sizeof(double) : sizeof(float)) : nullptr};
  const auto kernel = FASTALIGN_KERNELS(policy_kernels).policy[wide];
  sum_blocks(logp.numel(), POLICY_SUMS, sums, [&](int64_t begin, int64_t end, double* part) { kernel(job, begin, end, part); });
}

void value_tokens(Tensor values, Tensor old_values, Tensor returns, Tensor mask, Tensor scale, double clip, Tensor sums, Tensor slopes) {
  const bool wide = is_double(values, "values");
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), "values: contiguous [N] wanted");
  check_like(old_values, "old_values", values);
  check_like(returns, "returns", values);
  check_like(slopes, "slopes", values);
  const ValueJob job{tokens_of(mask, scale, values), values.const_data_ptr(), old_values.const_data_ptr(), returns.const_data_ptr(), clip,
                     slopes.mutable_data_ptr()};
  const auto kernel = FASTALIGN_KERNELS(policy_kernels).value[wide];
  sum_blocks(values.numel(), VALUE_SUMS, sums, [&](int64_t begin, int64_t end, double* part) { kernel(job, begin, end, part); });
}

template <class A>
void gae_of(const Tensor& rewards, const Tensor& values, const Tensor& mask, const std::optional<Tensor>& bootstrap, double gamma, double lam,
            const Tensor& advantages, const Tensor& returns) {
  const GaeJob<A> job{static_cast<const A*>(rewards.const_data_ptr()),
                      static_cast<const A*>(values.const_data_ptr()),
                      static_cast<const bool*>(mask.const_data_ptr()),
                      bootstrap ? static_cast<const A*>(bootstrap->const_data_ptr()) : nullptr,
                      values.size(1),
                      gamma,
                      lam,
                      static_cast<A*>(advantages.mutable_data_ptr()),
                      static_cast<A*>(returns.mutable_data_ptr())};
  torch::stable::parallel_for(0, values.size(0), 8, [&](int64_t begin, int64_t end) { gae_range(job, begin, end); });
}

void gae_rows(Tensor rewards, Tensor values, Tensor mask, std::optional<Tensor> bootstrap, double gamma, double lam, Tensor advantages,
              Tensor returns) {
  const bool wide = is_double(values, "values");
  STD_TORCH_CHECK(values.dim() == 2 && values.is_contiguous(), "values: contiguous [B, T] wanted");
  check_like(rewards, "rewards", values);
  check_like(advantages, "advantages", values);
  check_like(returns, "returns", values);
  STD_TORCH_CHECK(mask.dim() == 2 && mask.numel() == values.numel() && mask.is_contiguous() && mask.scalar_type() == ScalarType::Bool,
                  "mask: contiguous bool of values' shape wanted");
  if (bootstrap)
    STD_TORCH_CHECK(bootstrap->dim() == 1 && bootstrap->size(0) == values.size(0) && bootstrap->is_contiguous() &&
                        bootstrap->scalar_type() == values.scalar_type(),
                    "bootstrap: contiguous [B] of values' dtype wanted");
  (wide ? gae_of<double> : gae_of<float>)(rewards, values, mask, bootstrap, gamma, lam, advantages, returns);
}

}  // namespace
}  // namespace fastalign

STABLE_TORCH_LIBRARY_FRAGMENT(fastalign, m) {
  m.def("policy_tokens(Tensor logp, Tensor old_logp, Tensor advantages, Tensor mask, Tensor scale, Tensor? entropy, Tensor? reference_logp, "
        "float lower, float upper, float dual, float entropy_coefficient, float kl_coefficient, int kl_estimator, Tensor(a!) sums, Tensor(b!) slopes) -> ()");
  m.def("value_tokens(Tensor values, Tensor old_values, Tensor returns, Tensor mask, Tensor scale, float clip, Tensor(a!) sums, Tensor(b!) slopes) -> "
        "()");
  m.def("gae_rows(Tensor rewards, Tensor values, Tensor mask, Tensor? bootstrap, float gamma, float lam, Tensor(a!) advantages, "
        "Tensor(b!) returns) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign, CPU, m) {
  m.impl("policy_tokens", TORCH_BOX(&fastalign::policy_tokens));
  m.impl("value_tokens", TORCH_BOX(&fastalign::value_tokens));
  m.impl("gae_rows", TORCH_BOX(&fastalign::gae_rows));
}
