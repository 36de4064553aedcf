// Sums and maxima of a warp, and sums of the threads of a row.
#pragma once

#include "launch.cuh"

namespace fastbert {

constexpr unsigned kAll = 0xffffffffu;

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(kAll, value, apart);
  return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAll, value, apart));
  return value;
}

// The sums of a and of b over a row's THREADS threads, a warp or the whole block; all get them.
template <int THREADS>
__device__ inline float2 row_sums(float a, float b) {
  a = warp_sum(a);
  b = warp_sum(b);
  if constexpr (THREADS > 32) {
    constexpr int kWarps = THREADS / 32;
    __shared__ float2 parts[kWarps];
    // other warps may still read the previous sums
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = make_float2(a, b);
    __syncthreads();
    a = b = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      a += parts[warp].x;
      b += parts[warp].y;
    }
  }
  return make_float2(a, b);
}

template <int THREADS>
__device__ inline float row_sum(float value) {
  if constexpr (THREADS == 32) return warp_sum(value);
  return row_sums<THREADS>(value, 0.f).x;
}

}  // namespace fastbert
