// The second half of a deterministic sum over rows: adds up the fp32 partial sums, one per block.
#pragma once

#include "launch.cuh"
#include "types.cuh"

namespace fastbert {

constexpr int kSumRows = 16;

// out[which] = sum over P of partial[which] in a fixed order: 32 columns a block, 16 threads a
// column
static __global__ void __launch_bounds__(32 * kSumRows)
    sum_partials_kernel(const float* partial,  // (outputs, P, C)
                        MutableTable first,    // (C,)
                        MutableTable second,   // (C,)
                        int P, int C) {
  __shared__ float parts[kSumRows][32];
  const int col = blockIdx.x * 32 + threadIdx.x;
  partial += static_cast<int64_t>(blockIdx.y) * P * C;
  float total = 0.f;
  if (col < C) {
#pragma unroll 4
    for (int row = threadIdx.y; row < P; row += kSumRows)
      total += partial[static_cast<int64_t>(row) * C + col];
  }
  parts[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || col >= C) return;
  float sum[1] = {0.f};
#pragma unroll
  for (int row = 0; row < kSumRows; ++row) sum[0] += parts[row][threadIdx.x];
  // selected member by member: an index would put both tables in local memory
  first.data = blockIdx.y == 0 ? first.data : second.data;
  first.dtype = blockIdx.y == 0 ? first.dtype : second.dtype;
  first.store(0, col, C, false, sum);
}

inline void sum_partials(const Launch& launch, const float* partial, int P, int C,
                         MutableTable first, MutableTable second = {nullptr, 0}) {
  const dim3 grid(cdiv(C, 32), second.data ? 2 : 1);
  sum_partials_kernel<<<grid, dim3(32, kSumRows), 0, launch.stream>>>(partial, first, second, P, C);
  launch.check();
}

}  // namespace fastbert
