// Checks the tensors of screened logits and shares their rows out over threads. A row's statistics depend on that row alone, so they have the
// same bits with any number of threads and any split of the rows. On torch's stable ABI.
#define FASTALIGN_TARGET generic
#include "launch.h"

#include <algorithm>
#include <cmath>

#include "../int8/launch.h"
#include "../sampling/arguments.h"
#include "api.h"

#ifdef FASTALIGN_X86_TARGETS
namespace fastalign {
namespace avx512 {
extern const CodedKernels coded_kernels;
extern const ScreenKernels screen_kernels;
}  // namespace avx512

namespace {

Dtype factor_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return F32;
    case ScalarType::BFloat16: return BF16;
    case ScalarType::Half: return F16;
    default: expect(false, "hidden", t, "fp32, bf16 or fp16"); return DTYPES;
  }
}

template <class T> T* checked(const Tensor& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == int64_t(shape.size()) && t.is_contiguous() && t.scalar_type() == dtype;
  std::string text;
  int64_t d = 0;
  for (const int64_t size : shape) {
    same = same && t.size(d++) == size;
    text += (text.empty() ? "" : ", ") + std::to_string(size);
  }
  expect(same, name, t, "contiguous ", dtype_name(dtype), " [", text, "]");
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

ExactFactor factor(const Tensor& t, const char* name, int64_t H, ScalarType dtype) {
  expect(t.dim() == 2 && t.size(1) == H && t.scalar_type() == dtype && (H <= 1 || t.stride(1) == 1), name, t, dtype_name(dtype), " [*, ", H,
         "] with unit stride over H");
  return {t.const_data_ptr(), t.size(0) <= 1 ? H : t.stride(0)};
}

}  // namespace

void screen_rows(Tensor hidden8, Tensor weight8, int64_t width, Tensor hidden, Tensor weight, Tensor ids, std::optional<Tensor> bias,
                 double logit_scale, double softcap, double temperature, double eps, Tensor margins, std::optional<Tensor> bounds, Tensor stats,
                 Tensor counts, std::optional<Tensor> tile) {
  STD_TORCH_CHECK(has_int8_gemm(), "screen_rows: got a CPU without AVX-512 VNNI, expected one that has it");
  STD_TORCH_CHECK(eps > 0 && eps < 1, "eps: got ", eps, ", expected a probability in (0, 1)");
  expect(hidden.dim() == 2, "hidden", hidden, "a matrix [N, H]");
  expect(weight.dim() == 2, "weight", weight, "a matrix [V, H]");
  const int64_t N = hidden.size(0), H = hidden.size(1), V = weight.size(0);
  const ScalarType dtype = hidden.scalar_type();
  ScreenRows job{coded_panels(hidden8, "hidden8", true, N, width, true),
                 coded_panels(weight8, "weight8", false, V, width, true),
                 factor(hidden, "hidden", H, dtype),
                 factor(weight, "weight", H, dtype),
                 factor_dtype(hidden),
                 N,
                 V,
                 H,
                 checked<int64_t>(ids, "ids", ScalarType::Long, {N}),
                 bias ? checked<float>(*bias, "bias", ScalarType::Float, {V}) : nullptr,
                 {logit_scale, softcap, temperature},
                 float(std::log(eps)),
                 checked<float>(margins, "margins", ScalarType::Float, {N}),
                 bounds ? checked<float>(*bounds, "bounds", ScalarType::Float, {N}) : nullptr,
                 checked<float>(stats, "stats", ScalarType::Float, {7, N}),
                 checked<int32_t>(counts, "counts", ScalarType::Int, {2, N}),
                 nullptr,
                 0};
  for (int64_t n = 0; n < N; ++n) STD_TORCH_CHECK(job.ids[n] < V, "ids: got ", job.ids[n], " at ", n, ", expected ids below ", V);
  if (tile) {
    expect(tile->dim() == 2 && tile->size(0) == N && tile->size(1) == V && tile->scalar_type() == ScalarType::Float && (V <= 1 || tile->stride(1) == 1),
           "tile", *tile, "fp32 [", N, ", ", V, "] with unit stride over V");
    job.tile = static_cast<float*>(tile->mutable_data_ptr());
    job.tile_stride = N <= 1 ? V : tile->stride(0);
  }
  const int64_t threads = torch::stable::get_num_threads(), share = (N + threads - 1) / threads;
  const int64_t size = std::clamp((share + CODED_LEFT - 1) / CODED_LEFT * CODED_LEFT, CODED_LEFT, SCREENED_ROWS);
  torch::stable::parallel_for(0, (N + size - 1) / size, 1, [&](int64_t first, int64_t last) {
    avx512::screen_kernels.rows(job, avx512::coded_kernels, first * size, std::min(last * size, N));
  });
}

void screen_draws(Tensor tile, Tensor hidden, Tensor weight, std::optional<Tensor> bias, double logit_scale, double softcap, double eps, int64_t most,
                  Tensor row_bounds, Tensor column_bounds, Tensor counts, int64_t seed, std::optional<Tensor> table, double temperature, double top_k,
                  double top_p, double min_p, double repetition_penalty, std::optional<Tensor> sequence_ids, std::optional<Tensor> positions,
                  std::optional<Tensor> seen, std::optional<Tensor> allowed, std::optional<Tensor> finished) {
  STD_TORCH_CHECK(has_int8_gemm(), "screen_draws: got a CPU without AVX-512 VNNI, expected one that has it");
  STD_TORCH_CHECK(eps > 0 && eps < 1, "eps: got ", eps, ", expected a probability in (0, 1)");
  expect(hidden.dim() == 2, "hidden", hidden, "a matrix [B, H]");
  expect(weight.dim() == 2, "weight", weight, "a matrix [V, H]");
  const int64_t B = hidden.size(0), H = hidden.size(1), V = weight.size(0);
  const ScalarType dtype = hidden.scalar_type();
  expect(tile.dim() == 2 && tile.size(0) == B && tile.size(1) == V && tile.is_contiguous() && tile.scalar_type() == ScalarType::Float, "tile", tile,
         "contiguous fp32 [", B, ", ", V, "]");
  const float* rows = checked<float>(row_bounds, "row_bounds", ScalarType::Float, {3, B});
  const float* columns = checked<float>(column_bounds, "column_bounds", ScalarType::Float, {2, V});
  const ScreenDraws job{factor(hidden, "hidden", H, dtype),
                        factor(weight, "weight", H, dtype),
                        factor_dtype(hidden),
                        B,
                        V,
                        H,
                        bias ? checked<float>(*bias, "bias", ScalarType::Float, {V}) : nullptr,
                        {logit_scale, softcap, 1.0},
                        float(std::log(eps)),
                        rows,
                        rows + B,
                        rows + 2 * B,
                        columns,
                        columns + V,
                        static_cast<float*>(tile.mutable_data_ptr()),
                        V,
                        most,
                        checked<int32_t>(counts, "counts", ScalarType::Int, {2, B})};
  const auto launch = [&](const SampleJob& sampling, SampleDtype, const Tensor&) {
    torch::stable::parallel_for(0, B, 1, [&](int64_t first, int64_t last) { avx512::screen_kernels.draws(job, sampling, first, last); });
  };
  sample_with(launch, tile, seed, table, temperature, top_k, top_p, min_p, repetition_penalty, sequence_ids, positions, seen, allowed, finished, -1);
}

}  // namespace fastalign
#endif
