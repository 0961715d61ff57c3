// The CPU ops of 8-bit matrix products; ops.cpp registers them.
#pragma once

#include "../common/tensors.h"
#include "api.h"

namespace fastalign {

bool has_int8_gemm();
void int8_pack(Tensor x, bool left, int64_t width, int64_t block, std::optional<Tensor> basis, Tensor packed, Tensor norms);
void int8_digest(Tensor x, Tensor out);
void int8_gemm(Tensor left, Tensor right, int64_t width, bool low, Tensor out);

// The panels of `rows` rows in `packed`, which is checked.
CodedPanels coded_panels(const Tensor& packed, const char* name, bool left, int64_t rows, int64_t width, bool low);

}  // namespace fastalign
