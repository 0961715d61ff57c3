// What the launchers share: names of torch's stable ABI, and checks with messages of the form "argument: got X, expected Y".
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>

#include "targets.h"

// The namespace of the ops in torch, as in fastalign_kernels/namespace.py. A build for the Hugging Face Hub has one of its own (.ci/hub.py).
#ifndef FASTALIGN_OPS
#define FASTALIGN_OPS fastalign
#endif

namespace fastalign {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "fp32";
    case ScalarType::Double: return "fp64";
    case ScalarType::BFloat16: return "bf16";
    case ScalarType::Half: return "fp16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Char: return "int8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// "fp32 [2, 3, 7]", and the strides if the tensor is not contiguous.
inline std::string describe(const Tensor& t) {
  const auto list = [&](auto value) {
    std::string text = "[";
    for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(value(d));
    return text + "]";
  };
  std::string text = std::string(dtype_name(t.scalar_type())) + " " + list([&](int64_t d) { return t.size(d); });
  return t.is_contiguous() ? text : text + " with strides " + list([&](int64_t d) { return t.stride(d); });
}

template <class... Expected> void expect(bool holds, const char* argument, const Tensor& got, const Expected&... expected) {
  STD_TORCH_CHECK(holds, argument, ": got ", describe(got), ", expected ", expected...);
}

}  // namespace fastalign
