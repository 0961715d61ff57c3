// `fastalign::sample` on CUDA: one kernel. A row's chunks are split over blocks, and the block that finishes last draws (block.h).
#define FASTALIGN_TARGET device
#include "block.h"
#include "arguments.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

// Weak, so that the library also loads with a torch without CUDA, which lacks this function. It is found through libtorch.so (setup.py), which
// needs libtorch_cuda.so if that exists: `import torch` alone loads it into no scope that this library sees.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fastalign {
namespace {

using namespace device;

// Three blocks on a multiprocessor leave 80 registers a thread; by itself nvcc takes 64 and spills. Their loads in flight (8 logits a thread) are
// 24 KiB of fp32 or 12 of bf16 on a multiprocessor. By Little's law an H100 needs 15 to reach its memory's speed (predicted).
constexpr int RESIDENT = 3;

template <class T>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    sample_kernel(SampleJob job, float* workspace, uint32_t* tickets, int64_t chunks_per_block, uint32_t blocks_per_row) {
  __shared__ Shared shared;
  __shared__ bool last;
  const int64_t row = blockIdx.x / blocks_per_row, first = blockIdx.x % blocks_per_row * chunks_per_block;
  const int64_t chunks = (job.V + CHUNK - 1) / CHUNK;
  if (job.finished && job.finished[row]) {
    if (first == 0 && threadIdx.x == 0) write_unread(job, row, true);
    return;
  }
  float* const memory = workspace + row * 6 * chunks;
  const Summaries s = {memory, memory + chunks, memory + 2 * chunks, memory + 3 * chunks, memory + 4 * chunks,
                       reinterpret_cast<int32_t*>(memory + 5 * chunks)};
  summarise_chunks<T>(job, row, first, min(first + chunks_per_block, chunks), s);
  if (blocks_per_row > 1) {
    __threadfence();  // publish the summaries before the ticket
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomicAdd(tickets + row, 1u) == blocks_per_row - 1;
      __threadfence();
    }
    __syncthreads();
    if (!last) return;
  } else {
    __threadfence_block();
    __syncthreads();
  }
  draw_row<T>(shared, job, row, s);
}

#define CUDA_CHECK(call)                                                                                  \
  do {                                                                                                    \
    const cudaError_t status = call;                                                                      \
    STD_TORCH_CHECK(status == cudaSuccess, "sample: ", cudaGetErrorString(status), " (" #call ")");       \
  } while (0)

void launch(const SampleJob& job, SampleDtype dtype, const Tensor& logits) {
  const int32_t index = logits.get_device();
  const torch::stable::accelerator::DeviceGuard guard(index);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "sample: this torch was built without CUDA");
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &handle));
  const auto stream = static_cast<cudaStream_t>(handle);
  int processors = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
  // Twice the blocks that the GPU holds at once, and chunks for whole warps. How a row is split changes no result.
  const int64_t chunks = (job.V + CHUNK - 1) / CHUNK, least = job.B * chunks / (processors * RESIDENT * 2) + 1;
  const int64_t chunks_per_block = (least + WARPS - 1) / WARPS * WARPS;
  const int64_t blocks_per_row = (chunks + chunks_per_block - 1) / chunks_per_block;
  Tensor workspace = torch::stable::new_empty(logits, {job.B * 6 * chunks}, ScalarType::Float);
  // Counters of a row's finished blocks, from torch's allocator and zeroed for each launch. Memory kept between launches would have to be
  // separate for each stream and graph. The memset takes about 2 us (predicted) of the stream's time and none of the host's.
  Tensor tickets = torch::stable::new_empty(logits, {job.B}, ScalarType::Int);
  if (blocks_per_row > 1) CUDA_CHECK(cudaMemsetAsync(tickets.mutable_data_ptr(), 0, job.B * sizeof(uint32_t), stream));
  const auto kernel = dtype == SAMPLE_F32 ? sample_kernel<float> : dtype == SAMPLE_BF16 ? sample_kernel<bf16> : sample_kernel<fp16>;
  kernel<<<dim3(uint32_t(job.B * blocks_per_row)), THREADS, 0, stream>>>(job, static_cast<float*>(workspace.mutable_data_ptr()),
                                                                     static_cast<uint32_t*>(tickets.mutable_data_ptr()), chunks_per_block,
                                                                     uint32_t(blocks_per_row));
  CUDA_CHECK(cudaGetLastError());
}

SampleResult sample_cuda(Tensor logits, int64_t seed, std::optional<Tensor> table, double temperature, double top_k, double top_p, double min_p,
                         double repetition_penalty, std::optional<Tensor> sequence_ids, std::optional<Tensor> positions, std::optional<Tensor> seen,
                         std::optional<Tensor> allowed, std::optional<Tensor> finished, int64_t pad_id) {
  return sample_with(launch, logits, seed, table, temperature, top_k, top_p, min_p, repetition_penalty, sequence_ids, positions, seen, allowed, finished,
                     pad_id);
}

}  // namespace
}  // namespace fastalign

STABLE_TORCH_LIBRARY_IMPL(fastalign, CUDA, m) { m.impl("sample", TORCH_BOX(&fastalign::sample_cuda)); }
