// The launcher of `fastalign::sample` for CPUs. Threads share out rows, or the chunks of a row if there are fewer rows than threads.
#define FASTALIGN_TARGET generic
#include "launch.h"

#include <cstring>
#include <memory>

namespace fastalign {
FASTALIGN_DECLARE_KERNELS(SampleKernels, sample_kernels)

namespace {

// Memory for the summaries of one row and for the values that a filter reads.
class Workspace {
 public:
  explicit Workspace(int64_t V) : chunks_((V + CHUNK - 1) / CHUNK), padded_((chunks_ + COMBINE_LANES - 1) / COMBINE_LANES * COMBINE_LANES) {
    memory_ = std::make_unique_for_overwrite<float[]>(6 * padded_ + V + 16);  // pages that no filter needs stay untouched
    float* p = memory_.get();
    memset(p, 0, 6 * padded_ * sizeof(float));  // the sums of chunks that only fill the last lanes
    summaries = {p, p + padded_, p + 2 * padded_, p + 3 * padded_, p + 4 * padded_, reinterpret_cast<int32_t*>(p + 5 * padded_)};
    for (int64_t c = chunks_; c < padded_; ++c) summaries.top[c] = summaries.raw_top[c] = -INFINITY;
    values = p + 6 * padded_;
  }
  Summaries summaries;
  float* values;

 private:
  int64_t chunks_, padded_;
  std::unique_ptr<float[]> memory_;
};

void launch(const SampleJob& job, SampleDtype dtype, const Tensor&) {
  const SampleKernels& kernels = FASTALIGN_KERNELS(sample_kernels);
  const int64_t chunks = (job.V + CHUNK - 1) / CHUNK;
  if (job.B >= int64_t(torch::stable::get_num_threads())) {
    // One thread runs both parts of a row, so the second finds the row in the L2 cache.
    torch::stable::parallel_for(0, job.B, 1, [&](int64_t begin, int64_t end) {
      Workspace local(job.V);
      for (int64_t row = begin; row < end; ++row) {
        kernels.summarise[dtype](job, row, 0, chunks, local.summaries);
        kernels.draw[dtype](job, row, local.summaries, local.values);
      }
    });
    return;
  }
  for (int64_t row = 0; row < job.B; ++row) {
    Workspace shared(job.V);
    torch::stable::parallel_for(0, chunks, 64, [&](int64_t begin, int64_t end) { kernels.summarise[dtype](job, row, begin, end, shared.summaries); });
    kernels.draw[dtype](job, row, shared.summaries, shared.values);
  }
}

}  // namespace

SampleResult sample(Tensor logits, int64_t seed, std::optional<Tensor> table, double temperature, double top_k, double top_p, double min_p,
                    double repetition_penalty, std::optional<Tensor> sequence_ids, std::optional<Tensor> positions, std::optional<Tensor> seen,
                    std::optional<Tensor> allowed, std::optional<Tensor> finished, int64_t pad_id) {
  return sample_with(launch, logits, seed, table, temperature, top_k, top_p, min_p, repetition_penalty, sequence_ids, positions, seen, allowed, finished,
                     pad_id);
}

}  // namespace fastalign
