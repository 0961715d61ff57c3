// The sampler without torch: with -DBLOCKS, by g++ and by nvcc, the CUDA block on the host, one thread after another
// (csrc/sampling/lockstep.h); with -DROWS, by g++, the rows of a CPU and the noise. A tenth of the time compiles the rows alone.
#define FASTALIGN_TARGET emulated
#ifdef BLOCKS
#include "../../csrc/sampling/block.h"
#endif
#ifdef ROWS
#include "../../csrc/sampling/rows.h"
#endif

#include <algorithm>
#include <memory>
#include <vector>

using namespace fastalign;

namespace {

int64_t chunks_of(const SampleJob& job) { return (job.V + CHUNK - 1) / CHUNK; }

}  // namespace

#ifdef BLOCKS
// What the searches of a call took.
struct Searches {
  int64_t alone;   // rows that one block had to search by itself
  int64_t listed;  // values between the edges of all rows
};

namespace {

template <class T>
bool list_tells(emulated::FilterShared& shared, const SampleJob& job, int64_t row, const emulated::ChunkSummary* s, emulated::RowMemory* memory) {
  const emulated::RowOptions options = emulated::options_of(job, row);
  emulated::read_lists(shared, memory, memory->state);
  float cut;
  return emulated::cut_by_list(shared, emulated::block_row<T>(job, row, options.penalty), options, s, memory->state, cut);
}

// The launches of launch.cu, each block after another.
template <class T> Searches blocks(const SampleJob& job, int chunks_per_block) {
  const int chunks = int(chunks_of(job));
  std::vector<emulated::ChunkSummary> summaries(chunks);
  const auto summarising = std::make_unique<emulated::SummaryShared>();
  const auto counting = std::make_unique<emulated::CountShared>();
  const auto filtering = std::make_unique<emulated::FilterShared>();
  emulated::ChunkSummary* const s = summaries.data();
  const auto memory = std::make_unique<emulated::RowMemory>();
  const emulated::RowState& state = memory->state;
  const auto for_shares = [&](auto f) {
    for (int first = 0; first < chunks; first += chunks_per_block) f(first, std::min(first + chunks_per_block, chunks));
  };
  Searches searches = {0, 0};
  for (int64_t row = 0; row < job.B; ++row) {
    if (job.finished && job.finished[row]) {
      emulated::write_unread(job, row, true);
      continue;
    }
    for_shares([&](int first, int last) { emulated::summarise_chunks<T>(job, row, first, last, s); });
    emulated::end_summaries<T>(*summarising, job, row, s, memory.get());
    if (state.step == emulated::RowState::SEARCH) {
      for_shares([&](int first, int last) { emulated::count_chunks<T>(*counting, job, row, first, last, s, memory.get()); });
      emulated::find_edges(*counting, emulated::options_of(job, row), memory.get());
    }
    if (state.step != emulated::RowState::DRAWN) {
      for_shares([&](int first, int last) { emulated::collect_chunks<T>(*filtering, job, row, first, last, s, memory.get()); });
      searches.listed += state.inside;
      if (state.step == emulated::RowState::SEARCH) searches.alone += !list_tells<T>(*filtering, job, row, s, memory.get());
      emulated::end_collection<T>(*filtering, job, row, s, memory.get());
    }
  }
  return searches;
}

}  // namespace

extern "C" Searches by_blocks(int dtype, const SampleJob* job, int64_t chunks_per_block) {
  return (dtype == SAMPLE_F32 ? blocks<float> : dtype == SAMPLE_BF16 ? blocks<bf16> : blocks<fp16>)(*job, int(chunks_per_block));
}

#endif

#ifdef ROWS
namespace {

// Summaries of `size` chunks in one piece of memory, with room for the values of a filter behind them.
struct Memory {
  explicit Memory(int64_t size, int64_t values = 0) : floats(6 * size + values) {
    float* p = floats.data();
    summaries = {p, p + size, p + 2 * size, p + 3 * size, p + 4 * size, reinterpret_cast<int32_t*>(p + 5 * size)};
  }
  std::vector<float> floats;
  Summaries summaries;
};

}  // namespace

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
