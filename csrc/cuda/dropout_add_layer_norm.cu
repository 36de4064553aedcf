// dropout_add_layer_norm: one pass each way; backward replays the mask from its seed.
#include "entries.h"
#include "rows.cuh"

namespace fastbert {
namespace {

// z = residual + dropout(x),  y = (z - mean) rstd weight + bias
template <typename T, typename S>
__global__ void __launch_bounds__(S::kForwardBlock)
    dropout_add_layer_norm_fwd_kernel(const T* x,         // (N, C)
                                      const T* residual,  // (N, C)
                                      Table weight,       // (C,)
                                      Table bias,         // (C,), or null
                                      T* y,               // (N, C)
                                      T* saved,           // (N, C): z, or null
                                      float* mean,        // (N,)
                                      float* rstd,        // (N,)
                                      Dropout dropout, int64_t N, int C, float eps, bool wide) {
  const int64_t row = forward_row<S>();
  if (row >= N) return;
  Row<T, S> z;
  z.load(x + row * C, C, wide);
  z.drop(dropout, row);
  z.add(residual + row * C, C, wide);
  if (saved) z.store(saved + row * C, C, wide);
  const float2 moments = z.normalise(C, eps);
  z.affine(weight, bias, C, wide);
  z.store(y + row * C, C, wide);
  if (threadIdx.x % S::kThreads == 0) {
    mean[row] = moments.x;
    rstd[row] = moments.y;
  }
}

// dresidual = dsum, the LayerNorm's gradient + dz;  dx = dropout(dsum)
template <typename T, typename S>
__global__ void __launch_bounds__(S::kBackwardBlock, S::kBackwardBlocks)
    dropout_add_layer_norm_bwd_kernel(const T* dy,        // (N, C)
                                      const T* saved,     // (N, C): z
                                      Table weight,       // (C,)
                                      const float* mean,  // (N,)
                                      const float* rstd,  // (N,)
                                      const T* dz,        // (N, C), or null
                                      T* dx,              // (N, C)
                                      T* dresidual,       // (N, C)
                                      float* partial,     // (2, blocks, C)
                                      Dropout dropout, int64_t N, int C, bool wide) {
  extern __shared__ __align__(16) float shared[];
  Sums<T, S> sums;
  sums.start();
  for (int64_t row = backward_row<S>(); row < N; row += backward_step<S>()) {
    RawRow<T, S> z;
    Row<T, S> g;
    z.load(saved + row * C, C, wide);
    g.load(dy + row * C, C, wide);
    sums.backward(g, z, weight, mean[row], rstd[row], C, wide);
    if (dz) g.add(dz + row * C, C, wide);
    g.store(dresidual + row * C, C, wide);
    g.drop(dropout, row);
    g.store(dx + row * C, C, wide);
  }
  sums.store(partial, shared, C, wide);
}

}  // namespace

void dropout_add_layer_norm_fwd(int dtype, const void* x, const void* residual, const void* weight,
                                int weight_dtype, const void* bias, int bias_dtype, void* y,
                                void* z, float* mean, float* rstd, const int64_t* seed,
                                int64_t site, int64_t threshold, float scale, const int64_t* rows,
                                int64_t N, int64_t C, float eps, int device, cudaStream_t stream) {
  const Launch launch("dropout_add_layer_norm_fwd", N, C, device, stream);
  const Dropout dropout = make_dropout(seed, site, threshold, scale, rows);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const bool wide = aligned(C, kVec<T>, x, residual, weight, bias, y, z);
    by_width<T>(C, [&](auto s) {
      using S = decltype(s);
      dropout_add_layer_norm_fwd_kernel<T, S>
          <<<cdiv(N, S::kForwardRows), S::kForwardBlock, 0, stream>>>(
              static_cast<const T*>(x), static_cast<const T*>(residual), {weight, weight_dtype},
              {bias, bias_dtype}, static_cast<T*>(y), static_cast<T*>(z), mean, rstd, dropout, N,
              static_cast<int>(C), eps, wide);
    });
  });
  launch.check();
}

void dropout_add_layer_norm_bwd(int dtype, const void* dy, const void* z, const void* weight,
                                int weight_dtype, const float* mean, const float* rstd,
                                const void* dz, void* dx, void* dresidual, float* partial,
                                void* dweight, int dweight_dtype, float* dbias, int blocks,
                                const int64_t* seed, int64_t site, int64_t threshold, float scale,
                                const int64_t* rows, int64_t N, int64_t C, int device,
                                cudaStream_t stream) {
  const Launch launch("dropout_add_layer_norm_bwd", N, C, device, stream);
  const Dropout dropout = make_dropout(seed, site, threshold, scale, rows);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const bool wide = aligned(C, kVec<T>, dy, z, weight, dz, dx, dresidual, partial);
    by_width<T>(C, [&](auto s) {
      using S = decltype(s);
      dropout_add_layer_norm_bwd_kernel<T, S>
          <<<blocks, S::kBackwardBlock, backward_shared<S>(C), stream>>>(
              static_cast<const T*>(dy), static_cast<const T*>(z), {weight, weight_dtype}, mean,
              rstd, static_cast<const T*>(dz), static_cast<T*>(dx), static_cast<T*>(dresidual),
              partial, dropout, N, static_cast<int>(C), wide);
    });
  });
  launch.check();
  sum_partials(launch, partial, blocks, static_cast<int>(C), {dweight, dweight_dtype},
               {dbias, kFloat32});
}

}  // namespace fastbert
