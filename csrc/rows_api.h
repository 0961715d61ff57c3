// What the launcher (ops.cpp) hands to the row kernels, and the table of kernels of each compiled target. Torch-free.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace fastalign {

// Inline members are forced inline: the linker must never keep a weak copy of one that was compiled for AVX-512.

// Where row n of a [B, T, V] tensor starts, in elements.
struct Strides {
  int64_t T, batch, time;
  __attribute__((always_inline)) int64_t at(int64_t n) const { return n / T * batch + n % T * time; }
};

struct Rows {
  const void* logits;  // [B, T, V], unit column stride: shifted logits[:, :-1] are no copy
  Strides strides;
  const void* bias;    // [V] of the logits' dtype, or null
  const int64_t* ids;  // [N], N = B*T, negative: ignored
  int64_t N, V;
  Transform transform;
  __attribute__((always_inline)) bool plain() const { return bias == nullptr && transform.logit_scale == 1 && transform.softcap == 0 && transform.temperature == 1; }
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
  const void* stats;  // [7, N] as written by a StatsRows job
  void *largest, *sums;  // [V]
  double* totals;     // [stretches, 2, N]
};
struct ColumnGrad : Rows {
  const int64_t* columns;  // [K], ascending
  int64_t K;
  bool gathered;             // whether logits are [N, K], of these columns
  const void* stats;         // [7, N] as written by a StatsRows job
  const void* coefficients;  // [4, N]
  void* out;                 // [N, K] of the logits' dtype
  Strides out_strides;
  double* totals;  // [2, N]
};
constexpr int64_t STRETCH = 1024;  // columns that are worked on at a time: 4 KiB of a row and their sums stay in L1



struct RowKernels {
  void (*stats[DTYPES])(const StatsRows&, int64_t begin, int64_t end);
  void (*grad[DTYPES])(const GradRows&, int64_t begin, int64_t end);
  void (*columns[DTYPES])(const ColumnSums&, int64_t begin, int64_t end);  // stretches begin to end
  void (*column_grad[DTYPES])(const ColumnGrad&, int64_t begin, int64_t end);
};

}  // namespace fastalign
