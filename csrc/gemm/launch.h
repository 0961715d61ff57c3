// The CPU op of matrix products; ops.cpp registers it.
#pragma once

#include "../common/tensors.h"

namespace fastalign {

void gemm(Tensor left, Tensor right, Tensor out, bool add, std::optional<Tensor> right_rows, std::optional<Tensor> out_rows);

}  // namespace fastalign
