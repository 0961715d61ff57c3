// Checked launchers of policy losses, GAE and whitening for CPUs, on torch's stable ABI.
#define FASTALIGN_TARGET generic
#include "launch.h"

#include <cmath>
#include <vector>

#include "api.h"
#include "gae.h"

namespace fastalign {
FASTALIGN_DECLARE_KERNELS(PolicyKernels, policy_kernels)

namespace {

constexpr int64_t BLOCK = 2048;  // tokens whose sums are taken together, whatever the threads

bool is_double(const Tensor& t, const char* name) {
  expect(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, name, t, "fp32 or fp64");
  return t.scalar_type() == ScalarType::Double;
}

void check_like(const Tensor& t, const char* name, const Tensor& like) {
  expect(t.numel() == like.numel() && t.dim() == like.dim() && t.is_contiguous() && t.scalar_type() == like.scalar_type(), name, t, "contiguous ",
         describe(like), " as the first input");
}

void check_mask(const Tensor& mask, const Tensor& like) {
  expect(mask.dim() == like.dim() && mask.numel() == like.numel() && mask.is_contiguous() && mask.scalar_type() == ScalarType::Bool, "mask", mask,
         "contiguous bool of the shape of ", describe(like));
}

Tokens tokens_of(const Tensor& mask, const Tensor& scale, const Tensor& like) {
  check_mask(mask, like);
  expect((scale.numel() == 1 || scale.numel() == like.numel()) && scale.is_contiguous() && scale.scalar_type() == like.scalar_type(), "scale", scale,
         "contiguous ", dtype_name(like.scalar_type()), ", one number or one for each token");
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

// `count` numbers of each block, written by kernel(begin, end, numbers). Added up in order, they give the same bits with any number of threads.
template <class Kernel> std::vector<double> of_blocks(int64_t N, int64_t count, Kernel kernel) {
  std::vector<double> parts((N + BLOCK - 1) / BLOCK * count);
  each_block(N, [&](int64_t begin, int64_t end, int64_t block) { kernel(begin, end, parts.data() + block * count); });
  return parts;
}

double* doubles_of(const Tensor& t, const char* name, int64_t count) {
  expect(t.dim() == 1 && t.size(0) == count && t.scalar_type() == ScalarType::Double && t.is_contiguous(), name, t, "contiguous fp64 [", count, "]");
  return static_cast<double*>(t.mutable_data_ptr());
}

template <class Kernel> void sum_blocks(int64_t N, int64_t count, const Tensor& sums, Kernel kernel) {
  double* out = doubles_of(sums, "sums", count);
  const std::vector<double> parts = of_blocks(N, count, kernel);
  for (int64_t k = 0; k < count; ++k) out[k] = 0;
  for (size_t p = 0; p < parts.size(); ++p) out[p % count] += parts[p];
}

}  // namespace

void policy_tokens(Tensor logp, Tensor old_logp, Tensor advantages, Tensor mask, Tensor scale, std::optional<Tensor> entropy,
                   std::optional<Tensor> reference_logp, double lower, double upper, double dual, double entropy_coefficient, double kl_coefficient,
                   int64_t kl_estimator, Tensor sums, Tensor slopes) {
  const bool wide = is_double(logp, "logp");
  expect(logp.is_contiguous(), "logp", logp, "contiguous");
  check_like(old_logp, "old_logp", logp);
  check_like(advantages, "advantages", logp);
  expect(slopes.dim() == logp.dim() + 1 && slopes.size(0) >= 1 && slopes.size(0) <= 2 && slopes.numel() == slopes.size(0) * logp.numel() &&
             slopes.is_contiguous() && slopes.scalar_type() == logp.scalar_type(),
         "slopes", slopes, "contiguous, one or two of ", describe(logp));
  char* first = static_cast<char*>(slopes.mutable_data_ptr());
  STD_TORCH_CHECK(kl_estimator >= 0 && kl_estimator < KL_ESTIMATORS, "kl_estimator: got ", kl_estimator, ", expected an index below ", int64_t(KL_ESTIMATORS));
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
  expect(values.is_contiguous(), "values", values, "contiguous");
  check_like(old_values, "old_values", values);
  check_like(returns, "returns", values);
  check_like(slopes, "slopes", values);
  const ValueJob job{tokens_of(mask, scale, values), values.const_data_ptr(), old_values.const_data_ptr(), returns.const_data_ptr(), clip,
                     slopes.mutable_data_ptr()};
  const auto kernel = FASTALIGN_KERNELS(policy_kernels).value[wide];
  sum_blocks(values.numel(), VALUE_SUMS, sums, [&](int64_t begin, int64_t end, double* part) { kernel(job, begin, end, part); });
}

namespace {

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

}  // namespace

void gae_rows(Tensor rewards, Tensor values, Tensor mask, std::optional<Tensor> bootstrap, double gamma, double lam, Tensor advantages,
              Tensor returns) {
  const bool wide = is_double(values, "values");
  expect(values.dim() == 2 && values.is_contiguous(), "values", values, "contiguous [B, T]");
  check_like(rewards, "rewards", values);
  check_like(advantages, "advantages", values);
  check_like(returns, "returns", values);
  check_mask(mask, values);
  if (bootstrap)
    expect(bootstrap->dim() == 1 && bootstrap->size(0) == values.size(0) && bootstrap->is_contiguous() &&
               bootstrap->scalar_type() == values.scalar_type(),
           "bootstrap", *bootstrap, "contiguous ", dtype_name(values.scalar_type()), " [", values.size(0), "]");
  (wide ? gae_of<double> : gae_of<float>)(rewards, values, mask, bootstrap, gamma, lam, advantages, returns);
}

namespace {

WhitenJob whiten_job(const Tensor& x, const Tensor& mask) {
  expect(x.is_contiguous(), "x", x, "contiguous");
  check_mask(mask, x);
  return {static_cast<const bool*>(mask.const_data_ptr()), x.const_data_ptr(), 0, 1, 0, nullptr};
}

}  // namespace

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

}  // namespace fastalign
