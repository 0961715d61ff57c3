// `fastalign::sample` on CUDA: one launch, or three where a filter needs a threshold (block_search.h). A row's chunks are split over blocks.
#define FASTALIGN_TARGET device
#include "block.h"
#include "arguments.h"

#include <algorithm>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

// Weak, so that the library also loads with a torch without CUDA, which lacks this function. It is found through libtorch.so (setup.py), which
// needs libtorch_cuda.so if that exists: `import torch` alone loads it into no scope that this library sees.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fastalign {
namespace {

using namespace device;

// Blocks that share a multiprocessor, and with that the registers of a thread: 64 for four, 80 for three. Loads in flight are 8 logits a thread:
// 32 KiB of fp32 on a multiprocessor with four. By Little's law an H100 needs 15 to reach its memory's speed (predicted). On an H200 two blocks
// took 81 us to collect at [64, 151936] where three took 59; four were not measured. From Blackwell on four would spill.
constexpr int TO_SUMMARISE = 4, TO_COUNT = 4;
__host__ __device__ constexpr int to_collect(int major) { return major < 10 ? 4 : 3; }
#ifdef __CUDA_ARCH__
constexpr int MAJOR = __CUDA_ARCH__ / 100;
#else
constexpr int MAJOR = 0;  // the host's copy of a kernel has no registers
#endif

// A call's memory on the device.
struct Memory {
  ChunkSummary* summaries;  // [B, chunks]
  uint32_t* tickets;        // [B], 0: blocks of a row that have summarised
  RowMemory* rows;          // [B], null without filters
};
// How a launch splits rows, which changes no result.
struct Split {
  int chunks, chunks_per_block;
  uint32_t blocks_per_row;
};
struct Share {  // of a block
  int64_t row;
  int first, last;
};
__device__ Share share_of(const Split& split) {
  const int first = int(blockIdx.x % split.blocks_per_row) * split.chunks_per_block;
  return {blockIdx.x / split.blocks_per_row, first, min(first + split.chunks_per_block, split.chunks)};
}
// Whether this block is the last of its row to come here. It then sees what the others wrote.
__device__ bool last_of_row(uint32_t* ticket, const Split& split) {
  __shared__ bool last;
  if (split.blocks_per_row == 1) {
    __syncthreads();
    return true;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // publish what this block wrote before the ticket
    last = atomicAdd(ticket, 1u) == split.blocks_per_row - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}
// From Hopper on, the blocks of a launch can take their places while the last blocks of the launch before still run.
__device__ void let_the_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ void wait_for_the_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <class T> __global__ void __launch_bounds__(THREADS, TO_SUMMARISE) summarise_kernel(SampleJob job, Memory memory, Split split) {
  __shared__ SummaryShared shared;
  let_the_next_launch_begin();
  const Share share = share_of(split);
  if (job.finished && job.finished[share.row]) {
    if (share.first == 0 && threadIdx.x == 0) {
      write_unread(job, share.row, true);
      if (memory.rows) memory.rows[share.row].state.step = RowState::DRAWN;
    }
    return;
  }
  ChunkSummary* const s = memory.summaries + share.row * split.chunks;
  summarise_chunks<T>(job, share.row, share.first, share.last, s);
  if (!last_of_row(memory.tickets + share.row, split)) return;
  end_summaries<T>(shared, job, share.row, s, memory.rows ? memory.rows + share.row : nullptr);
}

template <class T> __global__ void __launch_bounds__(THREADS, TO_COUNT) count_kernel(SampleJob job, Memory memory, Split split) {
  __shared__ CountShared shared;
  let_the_next_launch_begin();
  wait_for_the_launch_before();
  const Share share = share_of(split);
  RowMemory* const row = memory.rows + share.row;
  if (row->state.step != RowState::SEARCH) return;
  count_chunks<T>(shared, job, share.row, share.first, share.last, memory.summaries + share.row * split.chunks, row);
  if (last_of_row(&row->state.tickets[0], split)) find_edges(shared, options_of(job, share.row), row);
}

template <class T> __global__ void __launch_bounds__(THREADS, to_collect(MAJOR)) collect_kernel(SampleJob job, Memory memory, Split split) {
  __shared__ FilterShared shared;
  wait_for_the_launch_before();
  const Share share = share_of(split);
  RowMemory* const row = memory.rows + share.row;
  if (row->state.step == RowState::DRAWN) return;
  ChunkSummary* const s = memory.summaries + share.row * split.chunks;
  collect_chunks<T>(shared, job, share.row, share.first, share.last, s, row);
  if (last_of_row(&row->state.tickets[1], split)) end_collection<T>(shared, job, share.row, s, row);
}

#define CUDA_CHECK(call)                                                                                  \
  do {                                                                                                    \
    const cudaError_t status = call;                                                                      \
    STD_TORCH_CHECK(status == cudaSuccess, "sample: ", cudaGetErrorString(status), " (" #call ")");       \
  } while (0)

// Splits rows so that the blocks fill the GPU once, or a whole number of times.
Split split_of(const SampleJob& job, int64_t resident) {
  const int64_t chunks = (job.V + CHUNK - 1) / CHUNK, most = (chunks + WARPS - 1) / WARPS;  // a chunk for each warp
  int64_t blocks = 1;
  double filled = 0;
  for (int64_t waves = 1; waves <= 8; ++waves) {
    const int64_t fits = resident * waves / job.B < most ? resident * waves / job.B : most;
    const double fraction = double(fits * job.B) / double(resident * waves);
    if (fits >= 1 && fraction > filled + 0.03) {
      filled = fraction;
      blocks = fits;
    }
  }
  const int64_t of_warp = (chunks + blocks * WARPS - 1) / (blocks * WARPS), of_block = of_warp * WARPS;
  return {int(chunks), int(of_block), uint32_t((chunks + of_block - 1) / of_block)};
}

void launch(const SampleJob& job, SampleDtype dtype, const Tensor& logits) {
  const int32_t index = logits.get_device();
  const torch::stable::accelerator::DeviceGuard guard(index);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "sample: this torch was built without CUDA");
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &handle));
  const auto stream = static_cast<cudaStream_t>(handle);
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  const int processors = attribute(cudaDevAttrMultiProcessorCount), shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  // CUDA takes 1 KiB of shared memory for each block.
  const auto split_over = [&](int blocks, size_t shared) { return split_of(job, int64_t(processors) * std::min(blocks, shared_memory / int(shared + 1024))); };
  Memory memory = {};
  const Split split = split_over(TO_SUMMARISE, sizeof(SummaryShared));
  const auto floats = [&](int64_t n) { return torch::stable::new_empty(logits, {n}, ScalarType::Float); };
  Tensor summaries = floats(job.B * split.chunks * int64_t(sizeof(ChunkSummary) / sizeof(float)));
  memory.summaries = static_cast<ChunkSummary*>(summaries.mutable_data_ptr());
  // Counters of a row's finished blocks, from torch's allocator and zeroed for each call. Memory kept between calls would have to be
  // separate for each stream and graph. The memset takes about 2 us (predicted) of the stream's time and none of the host's.
  Tensor tickets = floats(job.B);
  memory.tickets = static_cast<uint32_t*>(tickets.mutable_data_ptr());
  if (split.blocks_per_row > 1) CUDA_CHECK(cudaMemsetAsync(memory.tickets, 0, job.B * sizeof(uint32_t), stream));
  // The device decides row by row what a filter needs; the host knows whether any row can have one.
  const bool searches = job.table || job.numbers[1] > 0 || job.numbers[2] < 1, filters = searches || job.numbers[3] > 0;
  std::optional<Tensor> rows;
  if (filters) {
    rows = floats(job.B * int64_t(sizeof(RowMemory) / sizeof(float)));
    memory.rows = static_cast<RowMemory*>(rows->mutable_data_ptr());
  }
  const auto run = [&](auto* kernel, const Split& split, bool overlaps) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(uint32_t(job.B * split.blocks_per_row));
    config.blockDim = dim3(THREADS);
    config.stream = stream;
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = overlaps && major >= 9;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, job, memory, split));
  };
  const auto launch_all = [&]<class T>(T) {
    run(summarise_kernel<T>, split, false);
    if (searches) run(count_kernel<T>, split_over(TO_COUNT, sizeof(CountShared)), true);
    if (filters) run(collect_kernel<T>, split_over(to_collect(major), sizeof(FilterShared)), true);
  };
  if (dtype == SAMPLE_F32) launch_all(float());
  else if (dtype == SAMPLE_BF16) launch_all(bf16());
  else launch_all(fp16());
}

SampleResult sample_cuda(Tensor logits, int64_t seed, std::optional<Tensor> table, double temperature, double top_k, double top_p, double min_p,
                         double repetition_penalty, std::optional<Tensor> sequence_ids, std::optional<Tensor> positions, std::optional<Tensor> seen,
                         std::optional<Tensor> allowed, std::optional<Tensor> finished, int64_t pad_id) {
  return sample_with(launch, logits, seed, table, temperature, top_k, top_p, min_p, repetition_penalty, sequence_ids, positions, seen, allowed, finished,
                     pad_id);
}

}  // namespace
}  // namespace fastalign

STABLE_TORCH_LIBRARY_IMPL(FASTALIGN_OPS, CUDA, m) { m.impl("sample", TORCH_BOX(&fastalign::sample_cuda)); }
