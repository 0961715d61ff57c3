// Matrix products with fp32 sums on CPUs: out (+)= left [M, K] right [K, N] of fp32, bf16 or fp16. On request, rows of `right` are gathered and
// rows of `out` scattered. This file shares the work out over threads; target.cpp has the arithmetic. On torch's stable ABI.
//
// Why not MKL's: on AMD it runs AVX2 code, and no GEMM of torch takes bf16 to fp32 on a CPU. gemm.py has the measured times.
#define FASTALIGN_TARGET generic
#include "launch.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>

#include "api.h"

#ifdef FASTALIGN_X86_TARGETS
namespace fastalign {
namespace avx512 { extern const GemmKernels gemm_kernels; }

namespace {

constexpr int64_t WORDS = 640;         // words of k at a time, so that a panel of 48 (120 KiB) and a block stay in L2
constexpr int64_t BLOCK = 384 * 1024;  // bytes of a block of the larger factor
constexpr int64_t PART_SUMS = 8 << 20; // bytes that the sums of all parts of k may take
constexpr int64_t MOST_PARTS = 8;      // parts of k
constexpr int64_t LEAST_WORDS = 256;   // words in a part of k

struct Buffer {
  std::unique_ptr<float, void (*)(void*)> memory;
  explicit Buffer(int64_t words) : memory(static_cast<float*>(std::aligned_alloc(64, words / 16 * 64 + 64)), std::free) {
    if (!memory) throw std::bad_alloc();
  }
  float* at(int64_t word) const { return memory.get() + word; }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Job {
  Factor left, right;
  Product out;
  bool pairs;
  int64_t K;

  int64_t step() const { return pairs ? 2 : 1; }
  int64_t words() const { return ceil_div(K, step()); }
  int64_t k(int64_t word) const { return std::min(K, word * step()); }
};

// [0, total) in equal parts of at most `most`.
struct Cut {
  int64_t total, number, size;
  Cut(int64_t total, int64_t most)
      : total(total), number(std::max<int64_t>(1, ceil_div(total, most))), size(std::max<int64_t>(1, ceil_div(total, number))) {}
  int64_t begin(int64_t i) const { return std::min(total, i * size); }
};

Product part(const Product& out, int64_t m, int64_t m_end, int64_t n, int64_t n_end, bool add) {
  return {out.data + n + (out.rows ? 0 : m * out.stride), out.stride, m_end - m, n_end - n, out.rows ? out.rows + m : nullptr, out.add || add};
}

using Pack = void (*)(const Factor&, bool, int64_t, int64_t, int64_t, int64_t, float*);

// All of a factor, [blocks of k][panels][words][P].
Buffer pack_whole(const Job& job, const Factor& x, Pack pack, int64_t P, const Cut& cut) {
  const int64_t panels = ceil_div(x.O, P);
  Buffer packed(panels * P * job.words());
  torch::stable::parallel_for(0, panels, 4, [&](int64_t first, int64_t last) {
    for (int64_t b = 0; b < cut.number; ++b) {
      const int64_t w = cut.begin(b), end = cut.begin(b + 1);
      pack(x, job.pairs, first * P, std::min(last * P, x.O), job.k(w), job.k(end), packed.at(w * panels * P + first * P * (end - w)));
    }
  });
  return packed;
}

// The smaller factor is packed as a whole. Threads share out the larger one's o in blocks that stay in L2.
void share_out_o(const Job& job, const GemmKernels& kernels, bool rows) {
  const Cut cut(job.words(), WORDS);
  const int64_t P = rows ? LEFT : RIGHT, small_P = rows ? RIGHT : LEFT;
  const Factor &large = rows ? job.left : job.right, &small = rows ? job.right : job.left;
  const Buffer whole = pack_whole(job, small, rows ? kernels.pack_right : kernels.pack_left, small_P, cut);
  const int64_t padded = ceil_div(small.O, small_P) * small_P;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = std::min(BLOCK / (cut.size * 4), ceil_div(large.O, 2 * threads));
  const int64_t width = std::max<int64_t>(1, most / P) * P;
  torch::stable::parallel_for(0, ceil_div(large.O, width), 1, [&](int64_t first, int64_t last) {
    const Buffer block(width * cut.size);
    for (int64_t i = first; i < last; ++i)
      for (int64_t b = 0; b < cut.number; ++b) {
        const int64_t w = cut.begin(b), words = cut.begin(b + 1) - w, o = i * width, end = std::min(large.O, o + width);
        (rows ? kernels.pack_left : kernels.pack_right)(large, job.pairs, o, end, job.k(w), job.k(w + words), block.at(0));
        const float* packed = whole.at(w * padded);
        if (rows) kernels.multiply(block.at(0), packed, job.pairs, words, part(job.out, o, end, 0, job.out.N, b > 0));
        else kernels.multiply(packed, block.at(0), job.pairs, words, part(job.out, 0, job.out.M, o, end, b > 0));
      }
  });
}

// Threads share out k, and rows as well if the parts of k do not divide evenly among them. The parts' sums are added up in the order of k.
// The shape alone decides how k is cut, so the sums have the same bits with any number of threads.
void share_out_k(const Job& job, const GemmKernels& kernels) {
  const int64_t M = job.out.M, N = job.out.N, threads = torch::stable::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(std::min(PART_SUMS / (M * N * 4), job.words() / LEAST_WORDS), 1, MOST_PARTS);
  const Cut ks(job.words(), ceil_div(job.words(), parts));
  const int64_t shares = threads > ks.number ? ceil_div(threads, ks.number) : threads / std::gcd(threads, ks.number);
  const Cut rows(M, ceil_div(ceil_div(M, shares), LEFT) * LEFT);
  const int64_t padded_rows = ceil_div(rows.size, LEFT) * LEFT, padded = ceil_div(N, RIGHT) * RIGHT;
  const int64_t most = std::clamp<int64_t>(2 * BLOCK / ((ceil_div(M, LEFT) * LEFT + padded) * 4), 32, WORDS) / 16 * 16;
  const Buffer sums((ks.number - 1) * M * N);
  torch::stable::parallel_for(0, ks.number * rows.number, 1, [&](int64_t first, int64_t last) {
    const Buffer left(padded_rows * most), right(padded * most);
    for (int64_t task = first; task < last; ++task) {
      const int64_t p = task / rows.number, m = rows.begin(task % rows.number), m_end = rows.begin(task % rows.number + 1);
      const Product sums_of_part = p ? Product{sums.at((p - 1) * M * N), N, M, N, nullptr, false} : job.out;
      for (int64_t w = ks.begin(p); w < ks.begin(p + 1); w += most) {
        const int64_t end = std::min(w + most, ks.begin(p + 1));
        kernels.pack_left(job.left, job.pairs, m, m_end, job.k(w), job.k(end), left.at(0));
        kernels.pack_right(job.right, job.pairs, 0, N, job.k(w), job.k(end), right.at(0));
        kernels.multiply(left.at(0), right.at(0), job.pairs, end - w, part(sums_of_part, m, m_end, 0, N, w > ks.begin(p)));
      }
    }
  });
  torch::stable::parallel_for(0, ks.number > 1 ? M : 0, 16, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      float* out = job.out.data + (job.out.rows ? job.out.rows[m] : m) * job.out.stride;
      for (int64_t p = 0; p + 1 < ks.number; ++p)
        for (int64_t n = 0; n < N; ++n) out[n] += *sums.at((p * M + m) * N + n);
    }
  });
}

Dtype factor_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return F32;
    case ScalarType::BFloat16: return BF16;
    case ScalarType::Half: return F16;
    default: expect(false, name, t, "fp32, bf16 or fp16"); return DTYPES;
  }
}

const int64_t* rows_of(const std::optional<Tensor>& rows, const char* name, int64_t below) {
  if (!rows) return nullptr;
  expect(rows->dim() == 1 && rows->is_contiguous() && rows->scalar_type() == ScalarType::Long, name, *rows, "contiguous int64 of one dimension");
  const int64_t* row = static_cast<const int64_t*>(rows->const_data_ptr());
  for (int64_t i = 0; i < rows->numel(); ++i)
    STD_TORCH_CHECK(row[i] >= 0 && row[i] < below, name, ": got ", row[i], " at ", i, ", expected rows in [0, ", below, ")");
  return row;
}

}  // namespace

void gemm(Tensor left, Tensor right, Tensor out, bool add, std::optional<Tensor> right_rows, std::optional<Tensor> out_rows) {
  STD_TORCH_CHECK(chosen_target() == 2, "gemm: got a CPU without AVX-512, expected one that has it");
  expect(left.dim() == 2, "left", left, "a matrix [M, K]");
  expect(right.dim() == 2, "right", right, "a matrix [K, N]");
  expect(out.dim() == 2, "out", out, "a matrix [M, N]");
  const int64_t M = left.size(0), K = left.size(1), N = right.size(1);
  if (right_rows) expect(right_rows->numel() == K, "right_rows", *right_rows, "[K] = [", K, "]");
  else expect(right.size(0) == K, "right", right, "[K, N] with K = ", K, " as left has it");
  if (out_rows) expect(out_rows->numel() == M, "out_rows", *out_rows, "[M] = [", M, "]");
  else expect(out.size(0) == M, "out", out, "[M, N] = [", M, ", ", N, "]");
  expect(out.size(1) == N && out.scalar_type() == ScalarType::Float && (N <= 1 || out.stride(1) == 1), "out", out, "fp32 [M, N] with N = ", N,
         " and unit stride over N");
  // The stride of a dimension of size 1 may be any number, and is 1 here.
  const auto stride = [](const Tensor& t, int64_t dim) { return t.size(dim) <= 1 ? 1 : t.stride(dim); };
  expect(stride(left, 0) == 1 || stride(left, 1) == 1, "left", left, "unit stride over M or K");
  expect(stride(right, 1) == 1 || (stride(right, 0) == 1 && !right_rows), "right", right, "unit stride over N, or over K without right_rows");
  if (M == 0 || N == 0) return;
  const int64_t* gathered = rows_of(right_rows, "right_rows", right.size(0));
  const int64_t* scattered = rows_of(out_rows, "out_rows", out.size(0));
  Job job{{left.const_data_ptr(), factor_dtype(left, "left"), stride(left, 0), stride(left, 1), M, K, nullptr},
          {right.const_data_ptr(), factor_dtype(right, "right"), stride(right, 1), stride(right, 0), N, K, gathered},
          {static_cast<float*>(out.mutable_data_ptr()), out.stride(0), M, N, scattered, add},
          __builtin_cpu_supports("avx512bf16") && (left.scalar_type() == ScalarType::BFloat16 || right.scalar_type() == ScalarType::BFloat16),
          K};
  const GemmKernels& kernels = avx512::gemm_kernels;
  if (K >= 4 * std::max(M, N)) share_out_k(job, kernels);
  else share_out_o(job, kernels, M >= N);
}
}  // namespace fastalign
#endif
