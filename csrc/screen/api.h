// What the launcher (launch.cpp) hands to the kernel of screened logits (target.cpp). Torch-free.
#pragma once

#include "../common/dtypes.h"
#include "../int8/api.h"
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

struct ScreenKernels {
  void (*rows)(const ScreenRows&, const CodedKernels&, int64_t begin, int64_t end);  // begin is a multiple of CODED_LEFT
};

}  // namespace fastalign
