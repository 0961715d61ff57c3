// What the ops of 8-bit matrix products (launch.cpp) hand to their arithmetic (target.cpp). Torch-free.
//
// A row x of K numbers is coded as y ~ scale * q, q in [-127, 127], with y = R (s * x): s turns signs, and R is a Hadamard matrix in blocks of
// `block`, divided by sqrt(block). R has orthonormal columns, so products of rows stay what they are, and an outlier is spread over its block.
// With a basis B [LOW, width] of orthonormal rows, B y goes in fp32 beside q. The products along B are then exact:
//
//   x . w ~ scale_x scale_w q_x . q_w + low_x . low_w,    low_w = B w,    low_x = B (y - scale_x q_x), where q_x codes y - B'B y
#pragma once

#include "../common/dtypes.h"

namespace fastalign {

enum CodedDtype { CODED_F32, CODED_BF16, CODED_F16, CODED_I8 };  // int8 rows are taken as they are: scale 1

struct CodedRows {
  const void* data;
  CodedDtype dtype;
  int64_t stride, O, K;
  int64_t width;       // K, or the columns of B: what the rows are padded to with zeros
  int64_t block;       // a power of two >= 16 that divides width, or 0: no rotation
  const float* basis;  // [LOW, width], or null
};

constexpr int64_t CODED_LEFT = 8, CODED_RIGHT = 48;  // rows of a panel, as in ../gemm/api.h
constexpr int64_t LOW = 16;

// A panel, in 32-bit numbers: [compensation][scale][low][words][rows]. A word is 4 neighbours along k. vpdpbusd multiplies unsigned by signed
// bytes, so left factors carry q + 128, and right ones a compensation: -128 times the sum of the row's q.
struct CodedPanels {
  int32_t* data;
  int64_t words, low;  // low: LOW or 0
  __attribute__((always_inline)) int64_t left_size() const { return CODED_LEFT * (1 + low + words); }
  __attribute__((always_inline)) int64_t right_size() const { return CODED_RIGHT * (2 + low + words); }
};

struct CodedKernels {
  // Panels first to last; norms [2, O]: of y - scale q, and of scale q (left) or of y without its part along B (right).
  void (*pack_left)(const CodedRows&, const CodedPanels&, int64_t first, int64_t last, float* norms);
  void (*pack_right)(const CodedRows&, const CodedPanels&, int64_t first, int64_t last, float* norms);
  // A hash of the bits of rows first to last. No change of a single element leaves it as it was.
  void (*digest)(const CodedRows&, int64_t first, int64_t last, int64_t* out);
  // out [M, N] = the product of M rows of the left panels and N of the right ones, both from their start.
  void (*multiply)(const CodedPanels& left, const CodedPanels& right, int64_t M, int64_t N, float* out, int64_t stride);
};

}  // namespace fastalign
