// The job that launch.cpp and launch.cu hand to the sampler, and the table of kernels of each compiled CPU target. Torch-free.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace fastalign {

// A call of `sample`: pointers to the device's memory, null for options that were not given.
struct SampleJob {
  const void* logits;  // [B, V], unit column stride
  int64_t B, V, row_stride;
  const double* table;  // [5, B] of the five numbers below, or null
  double numbers[5];    // temperature, top_k, top_p, min_p, repetition penalty
  int64_t seed;
  const int64_t *sequences, *positions;  // [B]
  const int32_t *seen, *allowed;         // [B, ceil(V / 32)]
  const bool* finished;                  // [B]
  int64_t pad_id;
  int64_t* token;  // [B]
  float* logs;     // [4, B]: logp, log_kept, logp_raw, entropy
  int64_t* kept;   // [B]
  bool* valid;     // [B]
};

namespace FASTALIGN_TARGET {

// A row's options. They depend on the row alone and on nothing of the batch.
struct RowOptions {
  float temperature, penalty;
  double top_p, min_p;
  int32_t top_k;  // 0: no limit
  Noise noise;
};

FA_HD RowOptions options_of(const SampleJob& job, int64_t row) {
  double n[5];
  for (int k = 0; k < 5; ++k) n[k] = job.table ? job.table[k * job.B + row] : job.numbers[k];
  RowOptions options;
  options.temperature = float(n[0]);
  options.top_k = n[1] < double(job.V) ? int32_t(n[1]) : 0;
  options.top_p = n[2];
  options.min_p = n[3];
  options.penalty = float(n[4]);
  options.noise.seed = uint64_t(job.seed);
  options.noise.sequence = uint64_t(job.sequences ? job.sequences[row] : row);
  options.noise.position = uint32_t(job.positions ? job.positions[row] : 0);
  return options;
}
// At least the smallest mass, so that top_p = 0 keeps the largest logit.
FA_HD double top_p_target(const RowOptions& o, double total) { return o.top_p * total > 1 ? o.top_p * total : 1; }
FA_HD bool filters(const RowOptions& o) { return o.top_k > 0 || o.top_p < 1 || o.min_p > 0; }

// What the filters keep: all logits from some value on. A chunk is skipped if its largest logit fails the condition.
struct Keep {
  float top, per_bit;  // of the row
  float cut, least;    // z >= cut, and (z - top) per_bit >= least
};
FA_HD bool keeps(const Keep& keep, float z) { return z > -INFINITY && z >= keep.cut && (z - keep.top) * keep.per_bit >= keep.least; }

FA_HD Keep everything(float top, float per_bit) { return Keep{top, per_bit, -INFINITY, -INFINITY}; }

// What a drawn row reports; the sums are relative to `top` and `raw_top`.
struct Drawn {
  int64_t token;
  float z, x;  // the token's logit with and without penalties
  float top, raw_top, entropy;
  double sum, log_sum, log_kept_sum, log_raw_sum;
  int64_t kept;
};

FA_HD float entropy_of(double log_raw_sum, double raw_sum, double raw_weighted) { return float(log_raw_sum - LN2 * raw_weighted / raw_sum); }

FA_HD void write_unread(const SampleJob& job, int64_t row, bool valid) {
  job.token[row] = job.pad_id;
  for (int k = 0; k < 4; ++k) job.logs[k * job.B + row] = valid ? 0.0f : NAN;
  job.kept[row] = 0;
  job.valid[row] = valid;
}

FA_HD void write_draw(const SampleJob& job, int64_t row, float temperature, const Drawn& d) {
  float* const logs = job.logs + row;
  const bool tempered = temperature > 0;
  logs[0] = tempered ? float((double(d.z) - double(d.top)) / double(temperature) - d.log_kept_sum) : 0.0f;
  logs[job.B] = tempered ? float(d.log_kept_sum - d.log_sum) : 0.0f;
  logs[2 * job.B] = float((double(d.x) - double(d.raw_top)) - d.log_raw_sum);
  logs[3 * job.B] = d.entropy;
  job.token[row] = d.token;
  job.kept[row] = d.kept;
  job.valid[row] = true;
}

}  // namespace FASTALIGN_TARGET

// Summaries of a row's chunks, arrays of `padded(V)`. Exponentials are relative to the chunk's largest value.
struct Summaries {
  float *top, *sum;                        // of z: largest; sum of 2^((z - top) per_bit)
  float *raw_top, *raw_sum, *raw_weighted; // of x: largest; sums of 2^t and of t 2^t with t = (x - raw_top) log2 e
  int32_t* finite;                         // how many z > -inf
};

enum SampleDtype { SAMPLE_F32, SAMPLE_BF16, SAMPLE_F16, SAMPLE_DTYPES };

struct SampleKernels {
  void (*summarise[SAMPLE_DTYPES])(const SampleJob&, int64_t row, int64_t first_chunk, int64_t last_chunk, const Summaries&);
  void (*draw[SAMPLE_DTYPES])(const SampleJob&, int64_t row, const Summaries&, float* scratch);  // scratch: V + 16 floats
};

}  // namespace fastalign
