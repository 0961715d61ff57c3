// The CPU ops of policy losses, GAE and whitening; ops.cpp registers them.
#pragma once

#include <tuple>
#include <vector>

#include "../common/tensors.h"

namespace fastalign {

// (loss [], means [8], gradients [1 or 2, ...]); options in the order of PolicyOption. Without scale, a token counts options[WEIGHT],
// or one over the mask's tokens if that is 0.
std::tuple<Tensor, Tensor, Tensor> policy_tokens(Tensor logp, Tensor old_logp, Tensor advantages, Tensor mask, std::optional<Tensor> scale,
                                                 std::optional<Tensor> entropy, std::optional<Tensor> reference_logp, std::vector<double> options);

// (loss [], clip_fraction and explained_variance [2], gradients [1, ...]); scale and weight as above.
std::tuple<Tensor, Tensor, Tensor> value_tokens(Tensor values, Tensor old_values, Tensor returns, Tensor mask, std::optional<Tensor> scale, double clip,
                                                double weight);

void gae_rows(Tensor rewards, Tensor values, Tensor mask, std::optional<Tensor> bootstrap, double gamma, double lam, Tensor advantages,
              Tensor returns);

void token_moments(Tensor x, Tensor mask, Tensor moments);

void whiten_tokens(Tensor x, Tensor mask, Tensor moments, bool shift_mean, double eps, Tensor out);

}  // namespace fastalign
