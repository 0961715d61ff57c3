// The CPU ops on logits in memory; ops.cpp registers them.
#pragma once

#include "../common/tensors.h"

namespace fastalign {

void row_stats(Tensor logits, Tensor ids, std::optional<Tensor> bias, double logit_scale, double softcap, double temperature, Tensor stats);

void row_grad(Tensor logits, Tensor ids, std::optional<Tensor> bias, double logit_scale, double softcap, double temperature, Tensor stats,
              Tensor coefficients, Tensor out);

void column_sums(Tensor logits, Tensor ids, std::optional<Tensor> bias, double logit_scale, double softcap, double temperature, Tensor stats,
                 Tensor largest, Tensor sums, Tensor totals);

// vocab_size: V, because the logits may hold the K columns only.
void column_grad(Tensor logits, Tensor columns, Tensor ids, std::optional<Tensor> bias, double logit_scale, double softcap, double temperature,
                 Tensor stats, Tensor coefficients, int64_t vocab_size, Tensor out, Tensor totals);

}  // namespace fastalign
