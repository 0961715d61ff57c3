// Statistics of rows of screened logits, in AVX-512. Logits come from 8-bit products (../int8), those that matter from the exact factors.
//
// A row's columns pass 192 at a time. A column whose z8 exceeds log eps + the logsumexp of the columns so far is a candidate; the others are
// summed. That threshold only rises, so no column above the final one is missed. When all columns have passed, the candidates below the final
// threshold join the sums, and the others, with the row's target and its largest columns, get exact logits. So no sum holds a term that is
// taken away later, and a confident row loses no digits. The first columns of a flat row all are candidates. If they are too many, the pass
// goes on without candidates, and a second one has the final threshold from the start.
#include "api.h"

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>

#include "../softmax/rows.h"
#include "draw.h"
#include "exact.h"

namespace fastalign {
namespace FASTALIGN_TARGET {
namespace {

using V16 = Vec<float>;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOTHING = -1e30f;  // the reference before any logit: finite, so that -inf - NOTHING is -inf
constexpr int64_t WINDOW = 512;    // columns whose exact rows stay in L2 while the block's candidates pass

struct RowState {
  V16 rest = {}, weighted = {}, total = {};  // over columns that are no candidates: sum e^d, sum d e^d, sum z, with d = z - reference
  double mass = 0, mass_at_threshold = 0;    // sum e^d of the candidates
  float reference = NOTHING, best = -INF, threshold = -INF, margin = 0;
  int64_t count = 0, open = 0, next = 0;
  bool resolved = true, counting = false, second = false;  // counting: without candidates, for a second pass
};

struct Candidates {
  std::unique_ptr<int32_t[]> columns{new int32_t[SCREENED_ROWS * MOST_CANDIDATES]};
  std::unique_ptr<float[]> logits{new float[SCREENED_ROWS * MOST_CANDIDATES]};  // transformed: of z8, later exact
};

V16 masked(V16 v, __mmask16 mask) { return (V16)_mm512_maskz_mov_ps(mask, (__m512)v); }
float largest_of(V16 v, __mmask16 mask) { return _mm512_mask_reduce_max_ps(mask, (__m512)v); }

void raise_reference(RowState& row, float to) {
  const float shift = row.reference - to, factor = std::exp(shift);
  row.weighted = factor * (row.weighted + shift * row.rest);
  row.rest = factor * row.rest;
  row.mass *= factor;
  row.mass_at_threshold *= factor;
  row.reference = to;
}

// The largest logits stay above it, however the exact ones are rounded.
void raise_threshold(RowState& row, double mass, float log_eps) {
  const float rounding = 1e-5f * std::fabs(row.best) + 1e-30f;
  row.mass_at_threshold = row.mass;
  row.threshold = std::min(row.reference + float(std::log(mass)) + log_eps, row.best - row.margin - rounding);
}

// Candidates at or below the threshold join the sums.
void prune(RowState& row, float threshold, int32_t* columns, float* logits, int64_t id) {
  int64_t kept = 0;
  row.mass = 0;
  for (int64_t i = 0; i < row.count; ++i) {
    const float z = logits[i], d = z - row.reference, e = std::exp(d);
    if (z > threshold || columns[i] == id) {
      row.mass += e;
      columns[kept] = columns[i];
      logits[kept++] = z;
      continue;
    }
    row.rest[0] += e;
    row.weighted[0] += std::max(-1e30f, d) * e;
    row.total[0] += z;
  }
  row.count = kept;
}

template <bool PLAIN> struct Screen {
  const ScreenRows& job;
  Candidates candidates = {};

  V16 transformed(const float* x, int64_t column, int64_t count) const {
    if (count == 16) return transform<float, PLAIN>(load_lanes(x), bias_at<float, float, PLAIN>(job.bias, column, 16), job.transform).z;
    return transform<float, PLAIN>(load_some<float, float>(x, count, 0.0f), bias_at<float, float, PLAIN>(job.bias, column, count), job.transform).z;
  }

  void keep(RowState& row, int64_t i, V16 z, __mmask16 over, int64_t column, int64_t id) {
    int32_t* const columns = candidates.columns.get() + i * MOST_CANDIDATES;
    float* const logits = candidates.logits.get() + i * MOST_CANDIDATES;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_mask_compressstoreu_epi32(columns + row.count, over, _mm512_add_epi32(lane, _mm512_set1_epi32(int32_t(column))));
    _mm512_mask_compressstoreu_ps(logits + row.count, over, (__m512)z);
    row.count += std::popcount(uint32_t(over));
    const float top = largest_of(z, over);
    row.best = std::max(row.best, top);
    if (top > row.reference + 8) raise_reference(row, top);
    row.mass += horizontal_sum<float>(masked(exp_lanes(z - row.reference), over));
    if (row.mass > 1.02 * row.mass_at_threshold) raise_threshold(row, row.mass, job.log_eps);
    if (row.count > MOST_CANDIDATES - 16) {
      prune(row, row.threshold, columns, logits, id);
      const bool fits = row.count <= MOST_CANDIDATES * 3 / 4;
      row.resolved = fits || !row.second;
      row.counting = !fits && !row.second;
    }
    if (!row.counting) return;
    prune(row, INF, columns, logits, -1);
    row.threshold = row.best;  // so that a larger logit still comes here
  }

  void pass(RowState& row, int64_t i, const float* x, int64_t begin, int64_t end, int64_t id, float bound) {
    for (int64_t v = begin; v < end; v += 16) {
      const int64_t count = std::min<int64_t>(16, end - v);
      const __mmask16 there = count == 16 ? 0xffff : (1 << count) - 1;
      const V16 z = transformed(x + (v - begin), v, count);
      __mmask16 over = _mm512_mask_cmp_ps_mask(there, (__m512)z, _mm512_set1_ps(row.threshold), _CMP_GT_OQ);
      if (id >= v && id < v + 16) over |= 1 << (id - v);
      if (over) {
        keep(row, i, z, over, v, id);
        if (!row.resolved) return;
      }
      const __mmask16 below = there & ~over;
      if (job.bounds) {
        const float floor = row.reference + job.log_eps - bound;
        row.open += std::popcount(uint32_t(_mm512_mask_cmp_ps_mask(below, (__m512)z, _mm512_set1_ps(floor), _CMP_GT_OQ)));
      }
      const V16 d = z - row.reference, e = masked(exp_lanes(d), below);
      row.rest += e;
      row.weighted += masked(max_lanes<float>(broadcast(-1e30f), d), below) * e;
      row.total += masked(z, below);
    }
  }

  // Exact logits of the candidates of rows begin to end: window by window, so that a row of the weight is read once for all of them.
  template <class T> void make_exact(RowState* rows, int64_t begin, int64_t end) {
    for (int64_t window = WINDOW; window < job.V + WINDOW; window += WINDOW)
      for (int64_t n = begin; n < end; ++n) {
        RowState& row = rows[n - begin];
        if (!row.resolved) continue;
        const int32_t* columns = candidates.columns.get() + (n - begin) * MOST_CANDIDATES;
        float* logits = candidates.logits.get() + (n - begin) * MOST_CANDIDATES;
        for (; row.next < row.count && columns[row.next] < window; ++row.next) {
          const int64_t column = columns[row.next];
          const float raw = exact_logit<T>(job.hidden, job.weight, n, column, job.H);
          if (job.tile) job.tile[n * job.tile_stride + column] = raw;
          logits[row.next] = transformed(&raw, column, 1)[0];
        }
      }
  }

  void finish(const RowState& row, int64_t i, int64_t n) const {
    const int64_t N = job.N;
    float* const stats = job.stats + n;
    const int32_t* columns = candidates.columns.get() + i * MOST_CANDIDATES;
    const float* logits = candidates.logits.get() + i * MOST_CANDIDATES;
    for (int k = 0; k < STATS; ++k) stats[k * N] = 0;
    job.counts[n] = job.ids[n] < 0 ? 0 : UNRESOLVED;
    job.counts[N + n] = int32_t(row.open);
    if (job.ids[n] < 0 || !row.resolved) return;
    float row_max = -INF, at_id = 0;
    for (int64_t k = 0; k < row.count; ++k) {
      row_max = std::max(row_max, logits[k]);
      if (columns[k] == job.ids[n]) at_id = logits[k];
    }
    const double shift = double(row.reference) - row_max, factor = std::exp(shift), rest = horizontal_sum<float>(row.rest);
    double sum = factor * rest, weighted = factor * (horizontal_sum<float>(row.weighted) + shift * rest), total = horizontal_sum<float>(row.total);
    for (int64_t k = 0; k < row.count; ++k) {
      const double d = double(logits[k]) - row_max, e = std::exp(d);
      sum += e;
      weighted += std::max(-1e30, d) * e;
      total += logits[k];
    }
    const double log_sum = std::log(sum);
    if (!std::isfinite(row_max) || !std::isfinite(log_sum) || !std::isfinite(weighted)) return;
    stats[LOGP * N] = (at_id - row_max) - float(log_sum);
    stats[MEAN_LOGP * N] = float(total / job.V - double(row_max) - log_sum);
    stats[ENTROPY * N] = float(log_sum - weighted / sum);
    stats[LSE * N] = float(double(row_max) + log_sum);
    stats[MAX * N] = row_max;
    stats[LOGSUM * N] = float(log_sum);
    stats[TOP1 * N] = at_id == row_max;
    job.counts[n] = int32_t(row.count);
  }

  void pass_all(const CodedKernels& kernels, RowState* rows, int64_t begin, int64_t end, bool second) {
    alignas(64) float scratch[SCREENED_ROWS * SCREENED_COLUMNS];
    const CodedPanels left{job.hidden8.data + begin / CODED_LEFT * job.hidden8.left_size(), job.hidden8.words, job.hidden8.low};
    for (int64_t v = 0, number = 0; v < job.V; v += SCREENED_COLUMNS, ++number) {
      const int64_t v_end = std::min(v + SCREENED_COLUMNS, job.V);
      const CodedPanels right{job.weight8.data + v / CODED_RIGHT * job.weight8.right_size(), job.weight8.words, job.weight8.low};
      float* const out = job.tile ? job.tile + begin * job.tile_stride + v : scratch;
      const int64_t stride = job.tile ? job.tile_stride : SCREENED_COLUMNS;
      if (!second || !job.tile) kernels.multiply(left, right, end - begin, v_end - v, out, stride);
      for (int64_t n = begin; n < end; ++n) {
        RowState& row = rows[n - begin];
        if (!row.resolved || row.second != second) continue;
        pass(row, n - begin, out + (n - begin) * stride, v, v_end, job.ids[n], job.bounds ? job.bounds[n] : 0);
        const bool rises = number % 8 == 7 && !row.counting && !second && row.mass > 0;
        if (rises) raise_threshold(row, row.mass + horizontal_sum<float>(row.rest), job.log_eps);
      }
    }
  }

  void block(const CodedKernels& kernels, int64_t begin, int64_t end) {
    const auto rows = std::make_unique<RowState[]>(SCREENED_ROWS);
    for (int64_t n = begin; n < end; ++n) {
      RowState& row = rows[n - begin];
      row.margin = job.margins[n];
      row.resolved = job.ids[n] >= 0 && std::isfinite(row.margin);
    }
    pass_all(kernels, rows.get(), begin, end, false);
    bool again = false;
    for (int64_t n = begin; n < end; ++n) {
      RowState& row = rows[n - begin];
      if (!row.resolved || !row.counting) continue;
      again = true;
      raise_threshold(row, horizontal_sum<float>(row.rest), job.log_eps);
      RowState next;
      next.reference = row.reference, next.best = row.best, next.threshold = row.threshold, next.margin = row.margin;
      next.mass_at_threshold = std::numeric_limits<double>::infinity();
      next.second = true;
      row = next;
    }
    if (again) pass_all(kernels, rows.get(), begin, end, true);
    for (int64_t n = begin; n < end; ++n) {
      RowState& row = rows[n - begin];
      if (!row.resolved) continue;
      if (!row.second) raise_threshold(row, row.mass + horizontal_sum<float>(row.rest), job.log_eps);
      prune(row, row.threshold, candidates.columns.get() + (n - begin) * MOST_CANDIDATES, candidates.logits.get() + (n - begin) * MOST_CANDIDATES, job.ids[n]);
    }
    if (job.dtype == F32) make_exact<float>(rows.get(), begin, end);
    else if (job.dtype == BF16) make_exact<bf16>(rows.get(), begin, end);
    else make_exact<fp16>(rows.get(), begin, end);
    for (int64_t n = begin; n < end; ++n) finish(rows[n - begin], n - begin, n);
  }
};

template <bool PLAIN> void screen(const ScreenRows& job, const CodedKernels& kernels, int64_t begin, int64_t end) {
  Screen<PLAIN> screen{job};
  for (int64_t n = begin; n < end; n += SCREENED_ROWS) screen.block(kernels, n, std::min(n + SCREENED_ROWS, end));
}

void rows(const ScreenRows& job, const CodedKernels& kernels, int64_t begin, int64_t end) {
  const bool plain = job.bias == nullptr && job.transform.logit_scale == 1 && job.transform.softcap == 0 && job.transform.temperature == 1;
  (plain ? screen<true> : screen<false>)(job, kernels, begin, end);
}

}  // namespace

extern const ScreenKernels screen_kernels;
const ScreenKernels screen_kernels = {rows, draws};

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
