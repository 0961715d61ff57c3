// Checked launchers of policy losses, GAE and whitening for CPUs, on torch's stable ABI.
#define FASTALIGN_TARGET generic
#include "launch.h"

#include <cmath>
#include <cstring>
#include <tuple>
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

// Eight bools at a time: a bool is a byte of 0 or 1.
int64_t tokens_in(const Tensor& mask) {
  const char* bytes = static_cast<const char*>(mask.const_data_ptr());
  const int64_t total = mask.numel();
  int64_t n = 0, count = 0;
  for (uint64_t word; n + 8 <= total; n += 8) {
    std::memcpy(&word, bytes + n, 8);
    count += (word * 0x0101010101010101u) >> 56;  // the sum of the bytes
  }
  for (; n < total; ++n) count += bytes[n];
  return count;
}

// What each token counts: the tensor `given` if there is one, else the number `weight`, or one over the mask's tokens if that is 0.
class Scale {
 public:
  Scale(const std::optional<Tensor>& given, double weight, const Tensor& mask, const Tensor& like) {
    if (given) {
      expect((given->numel() == 1 || given->numel() == like.numel()) && given->is_contiguous() && given->scalar_type() == like.scalar_type(), "scale",
             *given, "contiguous ", dtype_name(like.scalar_type()), ", one number or one for each token");
      data_ = given->const_data_ptr();
      each_ = given->numel() > 1;
    } else if (is_double(like, "tokens")) {
      wide_ = weight != 0 ? weight : 1 / double(tokens_in(mask));
      data_ = &wide_;
    } else {
      narrow_ = weight != 0 ? float(weight) : 1 / float(tokens_in(mask));
      data_ = &narrow_;
    }
  }
  Scale(const Scale&) = delete;  // data_ may point into it
  Tokens tokens(const Tensor& mask) const { return {static_cast<const bool*>(mask.const_data_ptr()), data_, each_}; }

 private:
  double wide_ = 0;
  float narrow_ = 0;
  const void* data_ = nullptr;
  bool each_ = false;
};

Tensor scalar_of(const Tensor& like, double value) {
  Tensor out = torch::stable::new_empty(like, {});
  if (is_double(like, "tokens")) *static_cast<double*>(out.mutable_data_ptr()) = value;
  else *static_cast<float*>(out.mutable_data_ptr()) = float(value);
  return out;
}

Tensor vector_of(const Tensor& like, const std::vector<double>& values) {
  Tensor out = torch::stable::new_empty(like, {static_cast<int64_t>(values.size())});
  for (size_t k = 0; k < values.size(); ++k) {
    if (is_double(like, "tokens")) static_cast<double*>(out.mutable_data_ptr())[k] = values[k];
    else static_cast<float*>(out.mutable_data_ptr())[k] = float(values[k]);
  }
  return out;
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

template <class Kernel> std::vector<double> sum_blocks(int64_t N, int64_t count, Kernel kernel) {
  const std::vector<double> parts = of_blocks(N, count, kernel);
  std::vector<double> sums(count);
  for (size_t p = 0; p < parts.size(); ++p) sums[p % count] += parts[p];
  return sums;
}

std::vector<double> means_of(const std::vector<double>& sums, double tokens) {
  std::vector<double> means;
  for (const double sum : sums) means.push_back(sum / (tokens > 1 ? tokens : 1));
  return means;
}

// [rows, ...] of the shape of `like`.
Tensor rows_like(const Tensor& like, int64_t rows) {
  std::vector<int64_t> shape{rows};
  for (int64_t d = 0; d < like.dim(); ++d) shape.push_back(like.size(d));
  return torch::stable::new_empty(like, shape);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> policy_tokens(Tensor logp, Tensor old_logp, Tensor advantages, Tensor mask, std::optional<Tensor> scale,
                                                 std::optional<Tensor> entropy, std::optional<Tensor> reference_logp, std::vector<double> options) {
  const bool wide = is_double(logp, "logp");
  expect(logp.is_contiguous(), "logp", logp, "contiguous");
  check_like(old_logp, "old_logp", logp);
  check_like(advantages, "advantages", logp);
  check_mask(mask, logp);
  STD_TORCH_CHECK(options.size() == POLICY_OPTIONS, "options: got ", options.size(), " numbers, expected ", int64_t(POLICY_OPTIONS));
  const double entropy_coefficient = options[ENTROPY_COEFFICIENT], kl_estimator = options[KL_ESTIMATOR];
  STD_TORCH_CHECK(kl_estimator >= 0 && kl_estimator < int(KL_ESTIMATORS), "kl_estimator: got ", kl_estimator, ", expected an index below ",
                  int64_t(KL_ESTIMATORS));
  const Tensor slopes = rows_like(logp, entropy && entropy_coefficient != 0 ? 2 : 1);
  char* first = static_cast<char*>(slopes.mutable_data_ptr());
  const Scale weight(scale, options[WEIGHT], mask, logp);
  const PolicyJob job{weight.tokens(mask),
                      logp.const_data_ptr(),
                      old_logp.const_data_ptr(),
                      advantages.const_data_ptr(),
                      data_of(entropy, "entropy", logp),
                      data_of(reference_logp, "reference_logp", logp),
                      options[LOWER],
                      options[UPPER],
                      options[DUAL],
                      entropy_coefficient,
                      options[KL_COEFFICIENT],
                      static_cast<int64_t>(kl_estimator),
                      first,
                      slopes.size(0) > 1 ? first + logp.numel() * (wide ? sizeof(double) : sizeof(float)) : nullptr};
  const auto kernel = FASTALIGN_KERNELS(policy_kernels).policy[wide];
  const auto sums = sum_blocks(logp.numel(), POLICY_SUMS, [&](int64_t begin, int64_t end, double* part) { kernel(job, begin, end, part); });
  return {scalar_of(logp, sums[LOSS]), vector_of(logp, means_of(sums, sums[TOKENS])), slopes};
}

std::tuple<Tensor, Tensor, Tensor> value_tokens(Tensor values, Tensor old_values, Tensor returns, Tensor mask, std::optional<Tensor> scale, double clip,
                                                double weight) {
  const bool wide = is_double(values, "values");
  expect(values.is_contiguous(), "values", values, "contiguous");
  check_like(old_values, "old_values", values);
  check_like(returns, "returns", values);
  check_mask(mask, values);
  const Tensor slopes = rows_like(values, 1);
  const Scale scales(scale, weight, mask, values);
  const ValueJob job{scales.tokens(mask), values.const_data_ptr(), old_values.const_data_ptr(), returns.const_data_ptr(), clip, slopes.mutable_data_ptr()};
  const auto kernel = FASTALIGN_KERNELS(policy_kernels).value[wide];
  const auto sums = sum_blocks(values.numel(), VALUE_SUMS, [&](int64_t begin, int64_t end, double* part) { kernel(job, begin, end, part); });
  const auto means = means_of(sums, sums[V_TOKENS]);
  const double left = means[V_ERROR_SQUARE] - means[V_ERROR] * means[V_ERROR];
  const double spread = means[V_RETURN_SQUARE] - means[V_RETURN] * means[V_RETURN];
  const double explained = spread > 1e-12 * means[V_RETURN_SQUARE] ? 1 - left / spread : NAN;  // below, the difference is rounding
  return {scalar_of(values, sums[V_LOSS]), vector_of(values, {means[V_CLIPPED], explained}), slopes};
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
