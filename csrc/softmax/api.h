// What the launchers (launch.cpp) hand to the softmax kernels, and the table of kernels of each compiled target. Torch-free.
#pragma once

#include <cstdint>

#include "../common/dtypes.h"

namespace fastalign {

struct Transform {
  double logit_scale, softcap, temperature;  // softcap 0: none
};

// Inline members are forced inline: the linker must never keep a weak copy of one that was compiled for AVX-512.

// Where row n of a [B, T, V] tensor starts, in elements.
struct Strides {
  int64_t T, batch, time;
  __attribute__((always_inline)) int64_t at(int64_t n) const { return n / T * batch + n % T * time; }
};

// Every job reads logits [B, T, V] as N = B * T rows. The column stride is 1, so shifted logits[:, :-1] need no copy.
struct Rows {
  const void* logits;
  Strides strides;
  const void* bias;    // [V] of the logits' dtype, or null
  const int64_t* ids;  // [N]; a negative id means an ignored row
  int64_t N, V;
  Transform transform;
  __attribute__((always_inline)) bool plain() const {
    return bias == nullptr && transform.logit_scale == 1 && transform.softcap == 0 && transform.temperature == 1;
  }
};
struct StatsRows : Rows {
  void* stats;  // [7, N], rows in the order of rows.h's Stat
};
struct GradRows : Rows {
  const void* stats;         // [7, N] as written by a StatsRows job
  const void* coefficients;  // [4, N], rows in the order of rows.h's Coefficient
  void* out;                 // [B, T, V] of the logits' dtype; may be `logits`
  Strides out_strides;
};
struct ColumnSums : Rows {
  const void* stats;           // [7, N] as written by a StatsRows job
  void *largest, *sums;        // [V]
  double* totals;              // [tiles, 2, N]
};
struct ColumnGrad : Rows {
  const int64_t* columns;  // [K], ascending
  int64_t K;
  bool gathered;             // whether logits hold these K columns only
  const void* stats;         // [7, N] as written by a StatsRows job
  const void* coefficients;  // [4, N]
  void* out;                 // [B, T, K] of the logits' dtype
  Strides out_strides;
  double* totals;  // [2, N]
};

constexpr int64_t COLUMN_TILE = 1024;  // 4 KiB of a row, so that it and its sums stay in L1

struct RowKernels {  // rows begin to end; of `columns`, tiles begin to end
  void (*stats[DTYPES])(const StatsRows&, int64_t begin, int64_t end);
  void (*grad[DTYPES])(const GradRows&, int64_t begin, int64_t end);
  void (*columns[DTYPES])(const ColumnSums&, int64_t begin, int64_t end);
  void (*column_grad[DTYPES])(const ColumnGrad&, int64_t begin, int64_t end);
};

}  // namespace fastalign
