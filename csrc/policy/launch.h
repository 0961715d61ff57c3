// The CPU ops of policy losses, GAE and whitening; ops.cpp registers them.
#pragma once

#include "../common/tensors.h"

namespace fastalign {

void policy_tokens(Tensor logp, Tensor old_logp, Tensor advantages, Tensor mask, Tensor scale, std::optional<Tensor> entropy,
                   std::optional<Tensor> reference_logp, double lower, double upper, double dual, double entropy_coefficient, double kl_coefficient,
                   int64_t kl_estimator, Tensor sums, Tensor slopes);

void value_tokens(Tensor values, Tensor old_values, Tensor returns, Tensor mask, Tensor scale, double clip, Tensor sums, Tensor slopes);

void gae_rows(Tensor rewards, Tensor values, Tensor mask, std::optional<Tensor> bootstrap, double gamma, double lam, Tensor advantages,
              Tensor returns);

void token_moments(Tensor x, Tensor mask, Tensor moments);

void whiten_tokens(Tensor x, Tensor mask, Tensor moments, bool shift_mean, double eps, Tensor out);

}  // namespace fastalign
