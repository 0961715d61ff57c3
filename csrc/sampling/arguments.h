// Turns the tensors of `fastalign::sample` into a checked SampleJob, for the launchers of CPUs and of CUDA.
#pragma once

#include <tuple>

#include "../common/tensors.h"
#include "api.h"

namespace fastalign {

using SampleResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // token [B], logs [4, B], kept [B], valid [B]

inline SampleDtype sample_dtype(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return SAMPLE_F32;
    case ScalarType::BFloat16: return SAMPLE_BF16;
    case ScalarType::Half: return SAMPLE_F16;
    default: expect(false, "logits", logits, "fp32, bf16 or fp16"); return SAMPLE_DTYPES;
  }
}

// The memory of an optional argument of shape [size0, size1] (size1 -1: [size0]), or null.
template <class T>
const T* memory_of(const std::optional<Tensor>& t, const char* name, const Tensor& logits, ScalarType dtype, int64_t size0, int64_t size1 = -1) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->device() == logits.device(), name, ": got a tensor on another device, expected the logits' device");
  const bool shaped = t->dim() == (size1 < 0 ? 1 : 2) && t->size(0) == size0 && (size1 < 0 || t->size(1) == size1);
  if (!shaped || !t->is_contiguous() || t->scalar_type() != dtype)
    expect(false, name, *t, "contiguous ", dtype_name(dtype), " [", size0, size1 < 0 ? "" : ", " + std::to_string(size1), "]");
  return static_cast<const T*>(t->const_data_ptr());
}

// Checks the arguments, allocates the results and hands the job to `launch`.
template <class Launch>
SampleResult sample_with(const Launch& launch, const Tensor& logits, int64_t seed, const std::optional<Tensor>& table, double temperature, double top_k,
                         double top_p, double min_p, double repetition_penalty, const std::optional<Tensor>& sequence_ids,
                         const std::optional<Tensor>& positions, const std::optional<Tensor>& seen, const std::optional<Tensor>& allowed,
                         const std::optional<Tensor>& finished, int64_t pad_id) {
  expect(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= int64_t(MAX_CHUNKS) * CHUNK && (logits.size(1) == 1 || logits.stride(1) == 1),
         "logits", logits, "[B, V] with unit stride over V and V in 1 to 2^20");
  const int64_t B = logits.size(0), V = logits.size(1), words = (V + 31) / 32;
  Tensor token = torch::stable::new_empty(logits, {B}, ScalarType::Long), logs = torch::stable::new_empty(logits, {4, B}, ScalarType::Float);
  Tensor kept = torch::stable::new_empty(logits, {B}, ScalarType::Long), valid = torch::stable::new_empty(logits, {B}, ScalarType::Bool);
  SampleJob job = {};
  job.logits = logits.const_data_ptr();
  job.B = B;
  job.V = V;
  job.row_stride = logits.stride(0);
  job.table = memory_of<double>(table, "table", logits, ScalarType::Double, 5, B);
  const double numbers[5] = {temperature, top_k, top_p, min_p, repetition_penalty};
  for (int k = 0; k < 5; ++k) job.numbers[k] = numbers[k];
  job.seed = seed;
  job.sequences = memory_of<int64_t>(sequence_ids, "sequence_ids", logits, ScalarType::Long, B);
  job.positions = memory_of<int64_t>(positions, "positions", logits, ScalarType::Long, B);
  job.seen = memory_of<int32_t>(seen, "seen", logits, ScalarType::Int, B, words);
  job.allowed = memory_of<int32_t>(allowed, "allowed", logits, ScalarType::Int, B, words);
  job.finished = memory_of<bool>(finished, "finished", logits, ScalarType::Bool, B);
  job.pad_id = pad_id;
  job.token = static_cast<int64_t*>(token.mutable_data_ptr());
  job.logs = static_cast<float*>(logs.mutable_data_ptr());
  job.kept = static_cast<int64_t*>(kept.mutable_data_ptr());
  job.valid = static_cast<bool*>(valid.mutable_data_ptr());
  if (B > 0) launch(job, sample_dtype(logits), logits);
  return {token, logs, kept, valid};
}

}  // namespace fastalign
