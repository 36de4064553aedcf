// layer_norm: rows in registers, centred fp32 statistics, a persistent backward with fixed sums.
#include <algorithm>

#include "entries.h"
#include "rows.cuh"

namespace fastbert {
namespace {

// y = (x - mean) rstd weight + bias
template <typename T, typename S>
__global__ void __launch_bounds__(S::kForwardBlock)
    layer_norm_fwd_kernel(const T* x,    // (N, C)
                          Table weight,  // (C,), or null
                          Table bias,    // (C,), or null
                          T* y,          // (N, C)
                          float* mean,   // (N,)
                          float* rstd,   // (N,)
                          int64_t N, int C, float eps, bool wide) {
  const int64_t row = forward_row<S>();
  if (row >= N) return;
  Row<T, S> z;
  z.load(x + row * C, C, wide);
  const float2 moments = z.normalise(C, eps);
  z.affine(weight, bias, C, wide);
  z.store(y + row * C, C, wide);
  if (threadIdx.x % S::kThreads == 0) {
    mean[row] = moments.x;
    rstd[row] = moments.y;
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kBackwardBlock, S::kBackwardBlocks)
    layer_norm_bwd_kernel(const T* dy,        // (N, C)
                          const T* x,         // (N, C)
                          Table weight,       // (C,), or null
                          const float* mean,  // (N,)
                          const float* rstd,  // (N,)
                          T* dx,              // (N, C)
                          float* partial,     // (2, blocks, C), or null
                          int64_t N, int C, bool wide) {
  extern __shared__ __align__(16) float shared[];
  Sums<T, S> sums;
  sums.start();
  for (int64_t row = backward_row<S>(); row < N; row += backward_step<S>()) {
    RawRow<T, S> z;
    Row<T, S> g;
    z.load(x + row * C, C, wide);
    g.load(dy + row * C, C, wide);
    sums.backward(g, z, weight, mean[row], rstd[row], C, wide);
    g.store(dx + row * C, C, wide);
  }
  if (partial) sums.store(partial, shared, C, wide);
}

}  // namespace

void layer_norm_fwd(int dtype, const void* x, const void* weight, int weight_dtype,
                    const void* bias, int bias_dtype, void* y, float* mean, float* rstd, int64_t N,
                    int64_t C, float eps, int device, cudaStream_t stream) {
  const Launch launch("layer_norm_fwd", N, C, device, stream);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const bool wide = aligned(C, kVec<T>, x, weight, bias, y);
    by_width<T>(C, [&](auto s) {
      using S = decltype(s);
      layer_norm_fwd_kernel<T, S><<<cdiv(N, S::kForwardRows), S::kForwardBlock, 0, stream>>>(
          static_cast<const T*>(x), {weight, weight_dtype}, {bias, bias_dtype}, static_cast<T*>(y),
          mean, rstd, N, static_cast<int>(C), eps, wide);
    });
  });
  launch.check();
}

void layer_norm_bwd(int dtype, const void* dy, const void* x, const void* weight, int weight_dtype,
                    const float* mean, const float* rstd, void* dx, float* partial, void* dweight,
                    int dweight_dtype, float* dbias, int blocks, int64_t N, int64_t C, int device,
                    cudaStream_t stream) {
  const Launch launch("layer_norm_bwd", N, C, device, stream);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const bool wide = aligned(C, kVec<T>, dy, x, weight, dx, partial);
    by_width<T>(C, [&](auto s) {
      using S = decltype(s);
      layer_norm_bwd_kernel<T, S><<<blocks, S::kBackwardBlock, backward_shared<S>(C), stream>>>(
          static_cast<const T*>(dy), static_cast<const T*>(x), {weight, weight_dtype}, mean, rstd,
          static_cast<T*>(dx), partial, N, static_cast<int>(C), wide);
    });
  });
  launch.check();
  if (partial)
    sum_partials(launch, partial, blocks, static_cast<int>(C), {dweight, dweight_dtype},
                 {dbias, kFloat32});
}

int row_blocks(int64_t N, int64_t C, int dtype, int multiprocessors) {
  int64_t blocks = 0;
  by_dtype(dtype, [&](auto t) {
    by_width<decltype(t)>(C, [&](auto s) {
      using S = decltype(s);
      blocks = std::min<int64_t>(cdiv(N, S::kBackwardRows), S::kBackwardBlocks * multiprocessors);
    });
  });
  return static_cast<int>(blocks);
}

}  // namespace fastbert
