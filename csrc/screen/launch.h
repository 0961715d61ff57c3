// The CPU ops of screened logits; ops.cpp registers them.
#pragma once

#include "../common/tensors.h"

namespace fastalign {

void screen_rows(Tensor hidden8, Tensor weight8, int64_t width, Tensor hidden, Tensor weight, Tensor ids, std::optional<Tensor> bias,
                 double logit_scale, double softcap, double temperature, double eps, Tensor margins, std::optional<Tensor> bounds, Tensor stats,
                 Tensor counts, std::optional<Tensor> tile);
void screen_draws(Tensor tile, Tensor hidden, Tensor weight, std::optional<Tensor> bias, double logit_scale, double softcap, double eps, int64_t most,
                  Tensor row_bounds, Tensor column_bounds, Tensor counts, int64_t seed, std::optional<Tensor> table, double temperature, double top_k,
                  double top_p, double min_p, double repetition_penalty, std::optional<Tensor> sequence_ids, std::optional<Tensor> positions,
                  std::optional<Tensor> seen, std::optional<Tensor> allowed, std::optional<Tensor> finished);

}  // namespace fastalign
