// The op `sample` for CPUs; ops.cpp registers it, and launch.cu the one for CUDA.
#pragma once

#include "arguments.h"

namespace fastalign {

SampleResult sample(Tensor logits, int64_t seed, std::optional<Tensor> table, double temperature, double top_k, double top_p, double min_p,
                    double repetition_penalty, std::optional<Tensor> sequence_ids, std::optional<Tensor> positions, std::optional<Tensor> seen,
                    std::optional<Tensor> allowed, std::optional<Tensor> finished, int64_t pad_id);

}  // namespace fastalign
