// The exact logit of one column: a dot product in fp32 of a row of hidden states and a row of the weight. Torch-free.
#pragma once

#include <algorithm>

#include "../common/vectors.h"
#include "api.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

template <class T> FA_INLINE float exact_logit(const ExactFactor& hidden, const ExactFactor& weight, int64_t row, int64_t column, int64_t H) {
  const T* a = static_cast<const T*>(hidden.data) + row * hidden.stride;
  const T* b = static_cast<const T*>(weight.data) + column * weight.stride;
  Vec<float> sum[4] = {};
  int64_t k = 0;
  for (; k + 64 <= H; k += 64)
    for (int j = 0; j < 4; ++j) sum[j] += load_lanes(a + k + 16 * j) * load_lanes(b + k + 16 * j);
  for (; k < H; k += 16) {
    const int64_t count = std::min<int64_t>(16, H - k);
    sum[0] += load_some<T, float>(a + k, count, 0.0f) * load_some<T, float>(b + k, count, 0.0f);
  }
  return float(horizontal_sum<float>((sum[0] + sum[1]) + (sum[2] + sum[3])));
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
