// What the launcher (launch.cpp) hands to the kernels of screened logits (target.cpp, draw.h). Torch-free.
#pragma once

#include "../common/dtypes.h"
#include "../int8/api.h"
#include "../sampling/api.h"
#include "../softmax/api.h"

namespace fastalign {

struct ExactFactor {
  const void* data;
  int64_t stride;  // of its rows
};

struct ScreenRows {
  CodedPanels hidden8, weight8;
  ExactFactor hidden, weight;  // [N, H], [V, H] of `dtype`
  Dtype dtype;
  int64_t N, V, H;
  const int64_t* ids;  // [N]; negative: ignored
  const float* bias;   // [V], or null
  Transform transform;
  float log_eps;
  const float* margins;  // [N]: nats below the largest logit within which a column may be the largest. Not finite: not to be screened
  const float* bounds;   // [N], or null: the most that a logit can be off by
  float* stats;          // [7, N], rows in the order of ../softmax/rows.h's Stat
  int32_t* counts;       // [2, N]: exact logits, or UNRESOLVED; columns that `bounds` cannot rule out
  float* tile;           // [N, V] of raw logits, or null
  int64_t tile_stride;
};

constexpr int32_t UNRESOLVED = -1;
constexpr int64_t SCREENED_ROWS = 128;                 // at a time
constexpr int64_t SCREENED_COLUMNS = 4 * CODED_RIGHT;  // at a time: these logits and their factors stay in L2
constexpr int64_t MOST_CANDIDATES = 4096;              // of a row

// Rows of which `sample` draws tokens. Column v of row n is off by at most residuals[n] * column_lengths[v] + lengths[n] *
// column_residuals[v] + slacks[n], before the softcap.
struct ScreenDraws {
  ExactFactor hidden, weight;  // [B, H], [V, H] of `dtype`
  Dtype dtype;
  int64_t B, V, H;
  const float* bias;                                   // [V], or null
  Transform transform;                                 // its temperature is 1
  float log_eps;                                       // as in ScreenRows
  const float *residuals, *lengths, *slacks;           // [B]
  const float *column_lengths, *column_residuals;      // [V]
  float* tile;                                         // [B, V]: raw 8-bit logits, then transformed logits, exact where they matter
  int64_t tile_stride;
  int64_t most;                                        // exact logits of a row; one that needs more is UNRESOLVED
  int32_t* counts;                                     // [2, B]: exact logits, or UNRESOLVED; 1 if the bound leaves the token open
};

struct ScreenKernels {
  void (*rows)(const ScreenRows&, const CodedKernels&, int64_t begin, int64_t end);  // begin is a multiple of CODED_LEFT
  void (*draws)(const ScreenDraws&, const SampleJob&, int64_t begin, int64_t end);   // the job's options; not its logits and results
};

}  // namespace fastalign
