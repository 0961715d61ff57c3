// What the schedule of a matrix product (launch.cpp) hands to its arithmetic (target.cpp). Torch-free.
#pragma once

#include "../common/dtypes.h"

namespace fastalign {

// A factor [M, K] or [N, K]: element (o, k) lies at o * outer + k * inner, one of which is 1.
struct Factor {
  const void* data;
  Dtype dtype;
  int64_t outer, inner, O, K;
  const int64_t* rows;  // null, or [K] if outer is 1: row k lies at rows[k]
};

// An fp32 matrix [*, N] that a product is written or added to. Row m of the product is its row rows[m], or row m if rows is null.
struct Product {
  float* data;
  int64_t stride, M, N;
  const int64_t* rows;
  bool add;
};

// Factors are copied into panels of LEFT or RIGHT o, [panels][words][o], the last padded with zeros. A word is one fp32, or a pair of bf16
// that follow each other along k. With 8 x 48, 24 of 32 registers hold sums, and 11 loads serve 24 multiply-adds.
constexpr int64_t LEFT = 8, RIGHT = 48;

struct GemmKernels {
  void (*pack_left)(const Factor&, bool pairs, int64_t o, int64_t o_end, int64_t k, int64_t k_end, float* panels);
  void (*pack_right)(const Factor&, bool pairs, int64_t o, int64_t o_end, int64_t k, int64_t k_end, float* panels);
  void (*multiply)(const float* left, const float* right, bool pairs, int64_t words, const Product& out);
};

}  // namespace fastalign
