// Matrix products of 8-bit factors with fp32 results, on CPUs with AVX-512 VNNI. This file checks tensors and shares the work out over threads;
// target.cpp has the arithmetic. The codes are multiplied exactly, so no order of sums changes a bit. On torch's stable ABI.
#define FASTALIGN_TARGET generic
#include "launch.h"

#include <algorithm>

#ifdef FASTALIGN_X86_TARGETS
namespace fastalign {
namespace avx512 { extern const CodedKernels coded_kernels; }

namespace {

constexpr int64_t BLOCK_COLUMNS = 4 * CODED_RIGHT;  // of the right factor at a time: 110 KiB of codes at K = 576
constexpr int64_t MOST_WIDTH = 1 << 16;             // 127 * 255 * width fits into 31 bits

int64_t panels_of(int64_t rows, bool left) {
  const int64_t P = left ? CODED_LEFT : CODED_RIGHT;
  return (rows + P - 1) / P;
}

CodedDtype coded_dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return CODED_F32;
    case ScalarType::BFloat16: return CODED_BF16;
    case ScalarType::Half: return CODED_F16;
    case ScalarType::Char: return CODED_I8;
    default: expect(false, "x", x, "fp32, bf16, fp16 or int8"); return CODED_F32;
  }
}

}  // namespace

bool has_int8_gemm() { return chosen_target() == 2 && __builtin_cpu_supports("avx512vnni"); }

CodedPanels coded_panels(const Tensor& packed, const char* name, bool left, int64_t rows, int64_t width, bool low) {
  CodedPanels panels{nullptr, (width + 3) / 4, low ? LOW : 0};
  const int64_t size = panels_of(rows, left) * (left ? panels.left_size() : panels.right_size());
  expect(packed.dim() == 1 && packed.is_contiguous() && packed.scalar_type() == ScalarType::Int && packed.size(0) == size, name, packed,
         "contiguous int32 [", size, "]");
  panels.data = static_cast<int32_t*>(const_cast<void*>(packed.const_data_ptr()));
  return panels;
}

void int8_pack(Tensor x, bool left, int64_t width, int64_t block, std::optional<Tensor> basis, Tensor packed, Tensor norms) {
  STD_TORCH_CHECK(has_int8_gemm(), "int8_pack: got a CPU without AVX-512 VNNI, expected one that has it");
  expect(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1), "x", x, "a matrix [O, K] with unit stride over K");
  const int64_t O = x.size(0), K = x.size(1);
  STD_TORCH_CHECK(width >= K && width <= MOST_WIDTH, "width: got ", width, ", expected at least K = ", K, " and at most ", MOST_WIDTH);
  STD_TORCH_CHECK(block == 0 || (block >= 16 && (block & (block - 1)) == 0 && width % block == 0), "block: got ", block,
                  ", expected 0, or a power of two of at least 16 that divides width = ", width);
  if (basis)
    expect(basis->dim() == 2 && basis->size(0) == LOW && basis->size(1) == width && width % 16 == 0 && basis->is_contiguous() &&
               basis->scalar_type() == ScalarType::Float,
           "basis", *basis, "contiguous fp32 [", LOW, ", ", width, "], a multiple of 16");
  const CodedDtype dtype = coded_dtype(x);
  STD_TORCH_CHECK(dtype != CODED_I8 || (block == 0 && !basis), "x: got int8 with a rotation or a basis, expected neither");
  expect(norms.dim() == 2 && norms.size(0) == 2 && norms.size(1) == O && norms.is_contiguous() && norms.scalar_type() == ScalarType::Float, "norms",
         norms, "contiguous fp32 [2, ", O, "]");
  const CodedPanels panels = coded_panels(packed, "packed", left, O, width, basis.has_value());
  const CodedRows rows{x.const_data_ptr(), dtype, O <= 1 ? K : x.stride(0), O, K, width, block,
                       basis ? static_cast<const float*>(basis->const_data_ptr()) : nullptr};
  const CodedKernels& kernels = avx512::coded_kernels;
  float* const lengths = static_cast<float*>(norms.mutable_data_ptr());
  torch::stable::parallel_for(0, panels_of(O, left), 4, [&](int64_t first, int64_t last) {
    (left ? kernels.pack_left : kernels.pack_right)(rows, panels, first, last, lengths);
  });
}

void int8_digest(Tensor x, Tensor out) {
  STD_TORCH_CHECK(has_int8_gemm(), "int8_digest: got a CPU without AVX-512 VNNI, expected one that has it");
  expect(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1), "x", x, "a matrix [O, K] with unit stride over K");
  const int64_t O = x.size(0), K = x.size(1);
  expect(out.dim() == 1 && out.size(0) == O && out.is_contiguous() && out.scalar_type() == ScalarType::Long, "out", out, "contiguous int64 [", O, "]");
  const CodedRows rows{x.const_data_ptr(), coded_dtype(x), O <= 1 ? K : x.stride(0), O, K, K, 0, nullptr};
  int64_t* const hashes = static_cast<int64_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, O, 256, [&](int64_t first, int64_t last) { avx512::coded_kernels.digest(rows, first, last, hashes); });
}

void int8_gemm(Tensor left, Tensor right, int64_t width, bool low, Tensor out) {
  STD_TORCH_CHECK(has_int8_gemm(), "int8_gemm: got a CPU without AVX-512 VNNI, expected one that has it");
  expect(out.dim() == 2 && out.scalar_type() == ScalarType::Float && (out.size(1) <= 1 || out.stride(1) == 1), "out", out,
         "fp32 [M, N] with unit stride over N");
  const int64_t M = out.size(0), N = out.size(1);
  const CodedPanels of_left = coded_panels(left, "left", true, M, width, low), of_right = coded_panels(right, "right", false, N, width, low);
  float* const data = static_cast<float*>(out.mutable_data_ptr());
  const int64_t stride = M <= 1 ? N : out.stride(0);
  torch::stable::parallel_for(0, (N + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t n = block * BLOCK_COLUMNS;
      const CodedPanels columns{of_right.data + n / CODED_RIGHT * of_right.right_size(), of_right.words, of_right.low};
      avx512::coded_kernels.multiply(of_left, columns, M, std::min(BLOCK_COLUMNS, N - n), data + n, stride);
    }
  });
}

}  // namespace fastalign
#endif
