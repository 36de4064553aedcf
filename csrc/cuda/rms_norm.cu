// rms_norm: rows in registers, fp32 statistics, a persistent backward with fixed sums.
#include "entries.h"
#include "rows.cuh"

namespace fastbert {
namespace {

// y = x rstd weight
template <typename T, typename S>
__global__ void __launch_bounds__(S::kForwardBlock)
    rms_norm_fwd_kernel(const T* x,    // (N, C)
                        Table weight,  // (C,), or null
                        T* y,          // (N, C)
                        float* rstd,   // (N,)
                        int64_t N, int C, float eps, bool wide) {
  const int64_t row = forward_row<S>();
  if (row >= N) return;
  Row<T, S> z;
  z.load(x + row * C, C, wide);
  const float scale = z.normalise_rms(C, eps);
  z.affine(weight, {nullptr, 0}, C, wide);
  z.store(y + row * C, C, wide);
  if (threadIdx.x % S::kThreads == 0) rstd[row] = scale;
}

template <typename T, typename S>
__global__ void __launch_bounds__(S::kBackwardBlock, S::kBackwardBlocks)
    rms_norm_bwd_kernel(const T* dy,        // (N, C)
                        const T* x,         // (N, C)
                        Table weight,       // (C,), or null
                        const float* rstd,  // (N,)
                        T* dx,              // (N, C)
                        float* partial,     // (1, blocks, C), or null
                        int64_t N, int C, bool wide) {
  extern __shared__ __align__(16) float shared[];
  Sums<T, S, false> sums;
  sums.start();
  for (int64_t row = backward_row<S>(); row < N; row += backward_step<S>()) {
    RawRow<T, S> z;
    Row<T, S> g;
    z.load(x + row * C, C, wide);
    g.load(dy + row * C, C, wide);
    sums.backward(g, z, weight, 0.f, rstd[row], C, wide);
    g.store(dx + row * C, C, wide);
  }
  if (partial) sums.store(partial, shared, C, wide);
}

}  // namespace

void rms_norm_fwd(int dtype, const void* x, const void* weight, int weight_dtype, void* y,
                  float* rstd, int64_t N, int64_t C, float eps, int device, cudaStream_t stream) {
  const Launch launch("rms_norm_fwd", N, C, device, stream);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const bool wide = aligned(C, kVec<T>, x, weight, y);
    by_width<T>(C, [&](auto s) {
      using S = decltype(s);
      rms_norm_fwd_kernel<T, S><<<cdiv(N, S::kForwardRows), S::kForwardBlock, 0, stream>>>(
          static_cast<const T*>(x), {weight, weight_dtype}, static_cast<T*>(y), rstd, N,
          static_cast<int>(C), eps, wide);
    });
  });
  launch.check();
}

void rms_norm_bwd(int dtype, const void* dy, const void* x, const void* weight, int weight_dtype,
                  const float* rstd, void* dx, float* partial, void* dweight, int dweight_dtype,
                  int blocks, int64_t N, int64_t C, int device, cudaStream_t stream) {
  const Launch launch("rms_norm_bwd", N, C, device, stream);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const bool wide = aligned(C, kVec<T>, dy, x, weight, dx, partial);
    by_width<T>(C, [&](auto s) {
      using S = decltype(s);
      rms_norm_bwd_kernel<T, S><<<blocks, S::kBackwardBlock, backward_shared<S>(C), stream>>>(
          static_cast<const T*>(dy), static_cast<const T*>(x), {weight, weight_dtype}, rstd,
          static_cast<T*>(dx), partial, N, static_cast<int>(C), wide);
    });
  });
  launch.check();
  if (partial) sum_partials(launch, partial, blocks, static_cast<int>(C), {dweight, dweight_dtype});
}

}  // namespace fastbert
