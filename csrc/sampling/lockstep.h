// A block of threads. On a GPU it runs as one; on a CPU its threads run one after another between barriers, so the CUDA sampler is tested
// without a GPU.
//
//   FA_THREADS(t) { ... }   the code of each thread t. Threads exchange values in shared memory, with a barrier between write and read.
//   PerThread<T> x;         a variable of each thread: x[t]
#pragma once

#include "arithmetic.h"

namespace fastalign {

constexpr int THREADS = 256, WARP = 32, WARPS = THREADS / WARP;
static_assert(THREADS == COMBINE_LANES && THREADS == CHUNK && WARP == CHUNK_LANES, "a thread a lane");

namespace FASTALIGN_TARGET {

#ifdef __CUDA_ARCH__
#define FA_THREADS(t) if (const int t = threadIdx.x; true)
template <class T> struct PerThread {
  T value;
  __device__ __forceinline__ T& operator[](int) { return value; }
};
#else
#define FA_THREADS(t) for (int t = 0; t < THREADS; ++t)
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
FA_HD uint32_t take_slot(uint32_t* count) {
#ifdef __CUDA_ARCH__
  return atomicAdd(count, 1u);
#else
  return (*count)++;
#endif
}
// Reads what other blocks wrote, past this multiprocessor's L1 cache.
template <class T> FA_HD T fresh(const T* p) {
#ifdef __CUDA_ARCH__
  return __ldcg(p);
#else
  return *p;
#endif
}

// `f` over the 32 threads of each warp, halving 16, 8, 4, 2, 1. Every thread gets the result.
template <class T, class F> FA_HD void over_warps(PerThread<T>& x, F f) {
#ifdef __CUDA_ARCH__
  for (int width = WARP / 2; width > 0; width /= 2) x.value = f(x.value, __shfl_xor_sync(0xffffffffu, x.value, width));
#else
  for (int first = 0; first < THREADS; first += WARP) {
    for (int width = WARP / 2; width > 0; width /= 2)
      for (int i = first; i < first + width; ++i) x.values[i] = f(x.values[i], x.values[i + width]);
    for (int i = 1; i < WARP; ++i) x.values[first + i] = x.values[first];
  }
#endif
}

// `f` over the 256 values of `lanes`, halving 128, ..., 1. All threads get the result, and `lanes` may be written again.
template <class T, class F> FA_HD T over_block(T* lanes, F f) {
  barrier();
  for (int width = THREADS / 2; width >= WARP; width /= 2) {
    FA_THREADS(t) {
      if (t < width) lanes[t] = f(lanes[t], lanes[t + width]);
    }
    barrier();
  }
#ifdef __CUDA_ARCH__
  if (threadIdx.x < WARP)
#endif
    for (int width = WARP / 2; width > 0; width /= 2) {
      FA_THREADS(t) {
        if (t < width) lanes[t] = f(lanes[t], lanes[t + width]);
      }
#ifdef __CUDA_ARCH__
      __syncwarp();
#endif
    }
  barrier();
  const T result = lanes[0];
  barrier();
  return result;
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
