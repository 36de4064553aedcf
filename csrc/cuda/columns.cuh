// Kernels that loop down columns: a block of 32 x 8 threads holds 32 packs of columns. Its 8 rows
// of threads take every gridDim.x-th group of 8 matrix rows and may store the sum of these rows.
#pragma once

#include "partials.cuh"
#include "types.cuh"

namespace fastbert {

constexpr int kColumnThreads = 8;

template <typename T>
struct Columns {
  static constexpr int kV = kVec<T>, kWidth = 32 * kV;

  static __device__ int col() { return blockIdx.y * kWidth + threadIdx.x * kV; }
  static __device__ int64_t first_row() {
    return static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.y;
  }
  static __device__ int64_t step() { return static_cast<int64_t>(gridDim.x) * kColumnThreads; }
  static dim3 block() { return dim3(32, kColumnThreads); }
  static dim3 grid(unsigned blocks, int64_t C) { return dim3(blocks, cdiv(C, kWidth)); }

  // stores this block's sums in partial (blocks, C)
  static __device__ void store_sums(const float (&sums)[kV], float* partial, int C) {
    __shared__ float parts[kColumnThreads][kWidth];
#pragma unroll
    for (int i = 0; i < kV; ++i) parts[threadIdx.y][threadIdx.x * kV + i] = sums[i];
    __syncthreads();
    const int within = threadIdx.y * 32 + threadIdx.x, col = blockIdx.y * kWidth + within;
    if (within >= kWidth || col >= C) return;
    float total = 0.f;
#pragma unroll
    for (int row = 0; row < kColumnThreads; ++row) total += parts[row][within];
    partial[static_cast<int64_t>(blockIdx.x) * C + col] = total;
  }
};

}  // namespace fastbert
