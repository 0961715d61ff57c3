// Registration and checked launchers of the losses of policy optimisation, of GAE and of whitening for CPUs, on torch's stable ABI.
#define FASTALIGN_TARGET generic
#include "advantage.h"
#include "policy_api.h"
#include "targets.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cmath>
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

void check_mask(const Tensor& mask, const Tensor& like) {
  STD_TORCH_CHECK(mask.dim() == like.dim() && mask.numel() == like.numel() && mask.is_contiguous() && mask.scalar_type() == ScalarType::Bool,
                  "mask: contiguous bool of the first input's shape wanted");
}

Tokens tokens_of(const Tensor& mask, const Tensor& scale, const Tensor& like) {
  check_mask(mask, like);
  STD_TORCH_CHECK((scale.numel() == 1 || scale.numel() == like.numel()) && scale.is_contiguous() &&
                      scale.scalar_type() == like.scalar_type(),
                  "scale: contiguous, one number or one a token, of the first input's dtype wanted");
  return {static_cast<const bool*>(mask.const_data_ptr()), scale.const_data_ptr(), scale.numel() > 1};
}

const void* data_of(const std::optional<Tensor>& t, const char* name, const Tensor& like) {
  if (!t) return nullptr;
  check_like(*t, name, like);
  return t->const_data_ptr();
}

// Calls kernel(begin, end, block) for fixed blocks of N tokens.
template <class Kernel> void each_block(int64_t N, Kernel kernel) {
  const int64_t blocks = (N + BLOCK - 1) / BLOCK;
  torch::stable::parallel_for(0, blocks, 4, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) kernel(b * BLOCK, b + 1 < blocks ? (b + 1) * BLOCK : N, b);
  });
}

// `count` numbers of each block, put there by kernel(begin, end, its numbers). Whoever adds them up in order gets the same bits from any threads.
template <class Kernel> std::vector<double> of_blocks(int64_t N, int64_t count, Kernel kernel) {
  std::vector<double> parts((N + BLOCK - 1) / BLOCK * count);
  each_block(N, [&](int64_t begin, int64_t end, int64_t block) { kernel(begin, end, parts.data() + block * count); });
  return parts;
}

double* doubles_of(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == count && t.scalar_type() == ScalarType::Double && t.is_contiguous(), name, ": fp64 [", count,
                  "] wanted");
  return static_cast<double*>(t.mutable_data_ptr());
}

template <class Kernel> void sum_blocks(int64_t N, int64_t count, const Tensor& sums, Kernel kernel) {
  double* out = doubles_of(sums, "sums", count);
  const std::vector<double> parts = of_blocks(N, count, kernel);
  for (int64_t k = 0; k < count; ++k) out[k] = 0;
  for (size_t p = 0; p < parts.size(); ++p) out[p % count] += parts[p];
}

void policy_tokens(Tensor logp, Tensor old_logp, Tensor advantages, Tensor mask, Tensor scale, std::optional<Tensor> entropy,
                   std::optional<Tensor> reference_logp, double lower, double upper, double dual, double entropy_coefficient, double kl_coefficient,
                   int64_t kl_estimator, Tensor sums, Tensor slopes) {
  const bool wide = is_double(logp, "logp");
  STD_TORCH_CHECK(logp.is_contiguous(), "logp: contiguous wanted");
  check_like(old_logp, "old_logp", logp);
  check_like(advantages, "advantages", logp);
  STD_TORCH_CHECK(slopes.dim() == logp.dim() + 1 && slopes.size(0) >= 1 && slopes.size(0) <= 2 &&
                      slopes.numel() == slopes.size(0) * logp.numel() && slopes.is_contiguous() && slopes.scalar_type() == logp.scalar_type(),
                  "slopes: contiguous [1, ..] or [2, ..] of logp's shape and dtype wanted");
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
  STD_TORCH_CHECK(values.is_contiguous(), "values: contiguous wanted");
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
  check_mask(mask, values);
  if (bootstrap)
    STD_TORCH_CHECK(bootstrap->dim() == 1 && bootstrap->size(0) == values.size(0) && bootstrap->is_contiguous() &&
                        bootstrap->scalar_type() == values.scalar_type(),
                    "bootstrap: contiguous [B] of values' dtype wanted");
  (wide ? gae_of<double> : gae_of<float>)(rewards, values, mask, bootstrap, gamma, lam, advantages, returns);
}

WhitenJob whiten_job(const Tensor& x, const Tensor& mask) {
  STD_TORCH_CHECK(x.is_contiguous(), "x: contiguous wanted");
  check_mask(mask, x);
  return {static_cast<const bool*>(mask.const_data_ptr()), x.const_data_ptr(), 0, 1, 0, nullptr};
}

// Blocks are merged as Chan, Golub and LeVeque merge two: what separates their means is squared by itself.
void token_moments(Tensor x, Tensor mask, Tensor moments) {
  const WhitenJob job = whiten_job(x, mask);
  double* out = doubles_of(moments, "moments", MOMENTS);
  const auto kernel = FASTALIGN_KERNELS(policy_kernels).moments[is_double(x, "x")];
  const auto parts = of_blocks(x.numel(), MOMENTS, [&](int64_t begin, int64_t end, double* part) { kernel(job, begin, end, part); });
  double count = 0, sum = 0, squares = 0;
  for (size_t p = 0; p < parts.size(); p += MOMENTS) {
    count += parts[p + M_COUNT];
    sum += parts[p + M_COUNT] * parts[p + M_MEAN];
  }
  const double mean = sum / (count > 0 ? count : 1);
  for (size_t p = 0; p < parts.size(); p += MOMENTS) {
    const double apart = parts[p + M_MEAN] - mean;
    squares += parts[p + M_SQUARES] + parts[p + M_COUNT] * apart * apart;
  }
  out[M_COUNT] = count;
  out[M_MEAN] = mean;
  out[M_SQUARES] = squares;
}

void whiten_tokens(Tensor x, Tensor mask, Tensor moments, bool shift_mean, double eps, Tensor out) {
  WhitenJob job = whiten_job(x, mask);
  check_like(out, "out", x);
  const double* given = doubles_of(moments, "moments", MOMENTS);
  const double count = given[M_COUNT];
  job.mean = given[M_MEAN];
  job.factor = 1 / std::sqrt(given[M_SQUARES] / (count > 2 ? count - 1 : 1) + eps);
  job.offset = shift_mean ? 0 : job.mean;
  job.out = out.mutable_data_ptr();
  const auto kernel = FASTALIGN_KERNELS(policy_kernels).whiten[is_double(x, "x")];
  each_block(x.numel(), [&](int64_t begin, int64_t end, int64_t) { kernel(job, begin, end); });
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
  m.def("token_moments(Tensor x, Tensor mask, Tensor(a!) moments) -> ()");
  m.def("whiten_tokens(Tensor x, Tensor mask, Tensor moments, bool shift_mean, float eps, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastalign, CPU, m) {
  m.impl("policy_tokens", TORCH_BOX(&fastalign::policy_tokens));
  m.impl("value_tokens", TORCH_BOX(&fastalign::value_tokens));
  m.impl("gae_rows", TORCH_BOX(&fastalign::gae_rows));
  m.impl("token_moments", TORCH_BOX(&fastalign::token_moments));
  m.impl("whiten_tokens", TORCH_BOX(&fastalign::whiten_tokens));
}
