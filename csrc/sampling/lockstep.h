// A block of threads. On a GPU it runs as one; on a CPU its threads run one after another between barriers, so the CUDA sampler is tested
// without a GPU.
//
//   FA_THREADS(t) { ... }    the code of each thread t. Threads exchange values in shared memory, with a barrier between write and read.
//   FA_WARPS(w) { ... }      the code of each warp w, without barriers. Within it, FA_LANES(w, t) { ... } is the code of each of its threads.
//   PerThread<T> x;          a variable of each thread: x[t]
#pragma once

#include "arithmetic.h"

namespace fastalign {

constexpr int THREADS = 256, WARP = 32, WARPS = THREADS / WARP;
static_assert(THREADS == COMBINE_LANES && THREADS == CHUNK && WARP == CHUNK_LANES, "a thread a lane");

namespace FASTALIGN_TARGET {

// A loop over an array that has to stay in registers, and one whose body is too large to repeat.
#ifdef __CUDACC__
#define FA_UNROLL _Pragma("unroll")
#define FA_ONE_COPY _Pragma("unroll 1")
#else
#define FA_UNROLL
#define FA_ONE_COPY
#endif

#ifdef __CUDA_ARCH__
#define FA_THREADS(t) if (const int t = threadIdx.x; true)
#define FA_WARPS(w) if (const int w = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0); true)
#define FA_LANES(w, t) FA_THREADS(t)
template <class T> struct PerThread {
  T value;
  __device__ __forceinline__ T& operator[](int) { return value; }
};
#else
#define FA_THREADS(t) for (int t = 0; t < THREADS; ++t)
#define FA_WARPS(w) for (int w = 0; w < WARPS; ++w)
#define FA_LANES(w, t) for (int t = w * WARP; t < (w + 1) * WARP; ++t)
template <class T> struct PerThread {
  T values[THREADS];
  T& operator[](int t) { return values[t]; }
};
#endif

FA_HD void barrier() {
#ifdef __CUDA_ARCH__
  __syncthreads();
#endif
}
// A sum of 64 bits in two words, because shared memory adds 32 bits natively and 64 by compare and swap. It is exact in any order.
struct SplitSum {
  uint32_t low, high;
};
FA_HD void atomic_add(SplitSum* sum, uint64_t x) {
#ifdef __CUDA_ARCH__
  const uint32_t low = uint32_t(x), before = atomicAdd(&sum->low, low), high = uint32_t(x >> 32) + (before + low < before);
  if (high) atomicAdd(&sum->high, high);
#else
  const uint64_t total = (uint64_t(sum->high) << 32 | sum->low) + x;
  *sum = {uint32_t(total), uint32_t(total >> 32)};
#endif
}
FA_HD uint64_t value_of(const SplitSum& sum) { return uint64_t(sum.high) << 32 | sum.low; }
FA_HD uint32_t take_slots(uint32_t* count, uint32_t n) {
#ifdef __CUDA_ARCH__
  return atomicAdd(count, n);
#else
  *count += n;
  return *count - n;
#endif
}
FA_HD uint32_t take_slot(uint32_t* count) { return take_slots(count, 1); }
// Reads what other blocks wrote, past this multiprocessor's L1 cache.
template <class T> FA_HD T fresh(const T* p) {
#ifdef __CUDA_ARCH__
  return __ldcg(p);
#else
  return *p;
#endif
}

FA_HD void add_to(uint32_t* sum, uint32_t x) {
#ifdef __CUDA_ARCH__
  atomicAdd(sum, x);
#else
  *sum += x;
#endif
}
// To shared memory. nvcc would branch, and compute the address of the memory in each branch.
FA_HD void add_if(bool yes, uint32_t* sum, uint32_t x) {
#ifdef __CUDA_ARCH__
  asm volatile("{ .reg .pred yes; setp.ne.u32 yes, %0, 0; @yes red.shared.add.u32 [%1], %2; }"
               :
               : "r"(uint32_t(yes)), "r"(uint32_t(__cvta_generic_to_shared(sum))), "r"(x)
               : "memory");
#else
  if (yes) *sum += x;
#endif
}
FA_HD void add_to(uint64_t* sum, uint64_t x) {
#ifdef __CUDA_ARCH__
  atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(x));
#else
  *sum += x;
#endif
}
FA_HD void raise_to(uint32_t* largest, uint32_t x) {
#ifdef __CUDA_ARCH__
  atomicMax(largest, x);
#else
  *largest = x > *largest ? x : *largest;
#endif
}
FA_HD void lower_to(uint32_t* smallest, uint32_t x) {
#ifdef __CUDA_ARCH__
  atomicMin(smallest, x);
#else
  *smallest = x < *smallest ? x : *smallest;
#endif
}

FA_HD uint32_t number_of_bits(uint32_t x) {
#ifdef __CUDA_ARCH__
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}
FA_HD int lowest_bit(uint32_t x) {  // of x > 0
#ifdef __CUDA_ARCH__
  return __ffs(x) - 1;
#else
  return __builtin_ctz(x);
#endif
}
FA_HD float larger_of(float a, float b) {  // ignores NaN in b; of zeros of two signs, either
#ifdef __CUDA_ARCH__
  return fmaxf(a, b);
#else
  return b > a ? b : a;
#endif
}
FA_HD float smaller_of(float a, float b) {
#ifdef __CUDA_ARCH__
  return fminf(a, b);
#else
  return b < a ? b : a;
#endif
}

#ifdef __CUDA_ARCH__
template <class T, class F> __device__ __forceinline__ T words_through(const T& x, F f) {
  static_assert(sizeof(T) % 4 == 0, "whole words");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &x, sizeof x);
  for (uint32_t& word : words) word = f(word);
  T y;
  memcpy(&y, words, sizeof y);
  return y;
}
template <class T> __device__ __forceinline__ T shuffled(const T& x, int width) {
  return words_through(x, [&](uint32_t word) { return __shfl_xor_sync(0xffffffffu, word, width); });
}
template <class T> __device__ __forceinline__ T shuffled_down(const T& x, int width) {
  return words_through(x, [&](uint32_t word) { return __shfl_down_sync(0xffffffffu, word, width); });
}
#endif

// `f` over the 32 threads of a warp, halving 16, 8, 4, 2, 1. Each of them gets the result.
template <class T, class F> FA_HD void over_warp(PerThread<T>& x, int warp, F f) {
#ifdef __CUDA_ARCH__
  for (int width = WARP / 2; width > 0; width /= 2) x.value = f(x.value, shuffled(x.value, width));
#else
  T* const lanes = x.values + warp * WARP;
  for (int width = WARP / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = f(lanes[i], lanes[i + width]);
  for (int i = 1; i < WARP; ++i) lanes[i] = lanes[0];
#endif
}
FA_HD void sum_over_warp(PerThread<float>& x, int warp) {
  over_warp(x, warp, [](float a, float b) { return a + b; });
}

// Two sums over a warp in six exchanges, not ten. Only thread 0 of the warp gets both.
FA_HD void two_sums_over_warp(PerThread<float>& first, PerThread<float>& second, int warp) {
#ifdef __CUDA_ARCH__
  const bool upper = threadIdx.x & WARP / 2;  // these threads add up the second
  float sum = (upper ? second.value : first.value) + __shfl_xor_sync(0xffffffffu, upper ? first.value : second.value, WARP / 2);
  for (int width = WARP / 4; width > 0; width /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, width);
  first.value = sum;
  second.value = __shfl_xor_sync(0xffffffffu, sum, WARP / 2);
#else
  sum_over_warp(first, warp);
  sum_over_warp(second, warp);
#endif
}

// The largest and the smallest value of a warp. One reduction of integers in the order of floats takes the place of five exchanges.
FA_HD void largest_over_warp(PerThread<float>& x, int warp) {
#ifdef __CUDA_ARCH__
  const int bits = __float_as_int(x.value), largest = __reduce_max_sync(0xffffffffu, bits ^ ((bits >> 31) & 0x7fffffff));
  x.value = __int_as_float(largest ^ ((largest >> 31) & 0x7fffffff));
#else
  over_warp(x, warp, larger_of);
#endif
}
FA_HD void smallest_over_warp(PerThread<float>& x, int warp) {
#ifdef __CUDA_ARCH__
  const int bits = __float_as_int(x.value), smallest = __reduce_min_sync(0xffffffffu, bits ^ ((bits >> 31) & 0x7fffffff));
  x.value = __int_as_float(smallest ^ ((smallest >> 31) & 0x7fffffff));
#else
  over_warp(x, warp, smaller_of);
#endif
}
FA_HD void count_over_warp(PerThread<uint32_t>& x, int warp) {
#ifdef __CUDA_ARCH__
  x.value = __reduce_add_sync(0xffffffffu, x.value);
#else
  over_warp(x, warp, [](uint32_t a, uint32_t b) { return a + b; });
#endif
}

// `f` over the 256 values of `lanes`, halving 128, ..., 1. All threads get the result, and `lanes` may be written again.
template <class T, class F> FA_HD T over_block(T* lanes, F f) {
  barrier();
#ifdef __CUDA_ARCH__
  constexpr int ALONE = sizeof(T) > 8 ? 2 : WARPS;  // values a thread of the last warp reads: as many as registers hold
  for (int width = THREADS / 2; width >= ALONE * WARP; width /= 2) {
    if (threadIdx.x < width) lanes[threadIdx.x] = f(lanes[threadIdx.x], lanes[threadIdx.x + width]);
    __syncthreads();
  }
  if (threadIdx.x < WARP) {
    T parts[ALONE];
    for (int i = 0; i < ALONE; ++i) parts[i] = lanes[threadIdx.x + i * WARP];
    for (int width = ALONE / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) parts[i] = f(parts[i], parts[i + width]);
    T x = parts[0];
    for (int width = WARP / 2; width > 0; width /= 2) x = f(x, shuffled(x, width));
    if (threadIdx.x == 0) lanes[0] = x;
  }
#else
  for (int width = THREADS / 2; width > 0; width /= 2)
    for (int t = 0; t < width; ++t) lanes[t] = f(lanes[t], lanes[t + width]);
#endif
  barrier();
  const T result = lanes[0];
  barrier();
  return result;
}

// Replaces the value of each thread by the sum of those of the threads behind it: t + 1 to 255. `warps`: shared memory for 8 sums.
template <class T> FA_HD void sum_behind(PerThread<T>& x, T* warps) {
#ifdef __CUDA_ARCH__
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  T from = x.value;  // the sum of this thread's and those behind it in the warp
  for (int width = 1; width < WARP; width *= 2) {
    const T next = shuffled_down(from, width);
    if (lane + width < WARP) from += next;
  }
  T behind = shuffled_down(from, 1);
  if (lane == WARP - 1) behind = {};
  __syncthreads();
  if (lane == 0) warps[warp] = from;
  __syncthreads();
  for (int w = WARPS - 1; w > 0; --w)
    if (w > warp) behind += warps[w];
  x.value = behind;
#else
  T sum = {};
  for (int t = THREADS - 1; t >= 0; --t) {
    const T value = x.values[t];
    x.values[t] = sum;
    sum += value;
  }
#endif
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
