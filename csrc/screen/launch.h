// The CPU op of screened logits; ops.cpp registers it.
#pragma once

#include "../common/tensors.h"

namespace fastalign {

void screen_rows(Tensor hidden8, Tensor weight8, int64_t width, Tensor hidden, Tensor weight, Tensor ids, std::optional<Tensor> bias,
                 double logit_scale, double softcap, double temperature, double eps, Tensor margins, std::optional<Tensor> bounds, Tensor stats,
                 Tensor counts, std::optional<Tensor> tile);

}  // namespace fastalign
