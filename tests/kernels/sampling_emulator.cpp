// The sampler without torch, for test_sampling.py, which compiles this file with g++ and with nvcc: the CUDA block on the host, one thread
// after another (csrc/sampling/lockstep.h), and, by g++ alone, the rows of a CPU and the noise.
#define FASTALIGN_TARGET emulated
#include "../../csrc/sampling/block.h"
#ifndef __CUDACC__
#include "../../csrc/sampling/rows.h"
#endif

#include <memory>
#include <vector>

using namespace fastalign;

namespace {

int64_t chunks_of(const SampleJob& job) { return (job.V + CHUNK - 1) / CHUNK; }

// Summaries of `size` chunks in one piece of memory, with room for the values of a filter behind them.
struct Memory {
  explicit Memory(int64_t size, int64_t values = 0) : floats(6 * size + values) {
    float* p = floats.data();
    summaries = {p, p + size, p + 2 * size, p + 3 * size, p + 4 * size, reinterpret_cast<int32_t*>(p + 5 * size)};
  }
  std::vector<float> floats;
  Summaries summaries;
};

template <class T> void blocks(const SampleJob& job, int64_t chunks_per_block) {
  const int64_t chunks = chunks_of(job);
  const Memory memory(chunks);
  const auto shared = std::make_unique<emulated::Shared>();
  for (int64_t row = 0; row < job.B; ++row) {
    if (job.finished && job.finished[row]) {
      emulated::write_unread(job, row, true);
      continue;
    }
    for (int64_t first = 0; first < chunks; first += chunks_per_block)
      emulated::summarise_chunks<T>(job, row, first, first + chunks_per_block < chunks ? first + chunks_per_block : chunks, memory.summaries);
    emulated::draw_row<T>(*shared, job, row, memory.summaries);
  }
}

}  // namespace

extern "C" void by_blocks(int dtype, const SampleJob* job, int64_t chunks_per_block) {
  (dtype == SAMPLE_F32 ? blocks<float> : dtype == SAMPLE_BF16 ? blocks<bf16> : blocks<fp16>)(*job, chunks_per_block);
}

#ifndef __CUDACC__
extern "C" void by_rows(const SampleJob* job) {  // fp32
  const int64_t padded = (chunks_of(*job) + COMBINE_LANES - 1) / COMBINE_LANES * COMBINE_LANES;
  Memory memory(padded, job->V + 16);
  for (int64_t c = chunks_of(*job); c < padded; ++c) memory.summaries.top[c] = memory.summaries.raw_top[c] = -INFINITY;
  for (int64_t row = 0; row < job->B; ++row) {
    const bool same = row && job->row_stride == 0 && !emulated::filters(emulated::options_of(*job, row));  // only filters change summaries
    if (!same) emulated::summarise<float>(*job, row, 0, chunks_of(*job), memory.summaries);
    emulated::draw<float>(*job, row, memory.summaries, memory.floats.data() + 6 * padded);
  }
}

// How many of n exponentials lie below each of `limits`.
extern "C" void count_below(int64_t n, const float* limits, int64_t limits_count, int64_t* counts) {
  for (int64_t first = 0; first < n; first += emulated::L) {
    const emulated::f32x16 e = emulated::exponentials({1, uint64_t(first >> 20), 0}, uint32_t(first & 0xfffff));
    for (int64_t k = 0; k < limits_count; ++k) {
      const emulated::i32x16 below = emulated::bit_cast<emulated::i32x16>(e < limits[k]);
      for (int i = 0; i < emulated::L; ++i) counts[k] -= below[i];
    }
  }
}
#endif
