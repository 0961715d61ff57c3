// What the schedule of a matrix product (launch.cpp) hands to its arithmetic (target.cpp). Torch-free.
#pragma once

#include "../common/dtypes.h"

namespace fastalign {

// A factor [M, K] or [N, K]: element (o, k) lies at o * outer + k * inner, one of which is 1.
struct Factor {
  const void* data;
  Dtype dtype;
  int64_t outer, inner, O, K;
  const int64_t* rows;  // with outer 1, null or [K]: k stands at rows[k]
};

// A matrix [*, N] of fp32 that a product is written or added to; row m of the product is its row rows[m], or m where rows is null.
struct Product {
  float* data;
  int64_t stride, M, N;
  const int64_t* rows;
  bool add;
};

// Factors are copied into panels of so many o, [panels][words][o], the last filled up with zeros. A word is an fp32, or a pair of bf16
// that follow each other along k. 8 x 48: 24 of 32 registers hold sums, and 11 loads serve 24 multiply-adds.
constexpr int64_t LEFT = 8, RIGHT = 48;

struct GemmKernels {
  void (*pack_left)(const Factor&, bool pairs, int64_t o, int64_t o_end, int64_t k, int64_t k_end, float* panels);
  void (*pack_right)(const Factor&, bool pairs, int64_t o, int64_t o_end, int64_t k, int64_t k_end, float* panels);
  void (*multiply)(const float* left, const float* right, bool pairs, int64_t words, const Product& out);
};

}  // namespace fastalign
