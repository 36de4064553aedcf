// RMSNorm over the last dimension.
//
//   y = x * rstd * weight,   rstd = 1 / sqrt(mean(x^2) + eps)
//
// backward, with xhat = x * rstd and g = dy * weight:
//   dx = rstd * (g - xhat * mean(g * xhat)),   dweight = sum over rows of dy * xhat
#include "rms_norm.h"

#include "norm.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

template <typename T>
void rms_norm_fwd_row(const T* x, const float* weight, int64_t C, float eps, T* y, float* rstd) {
  const auto [squares] = column_sums<1>(C, [&](int64_t c, int64_t n, int k, Chains* sums) {
    const F value = load(x + c, n);
    sums->of[k] += value * value;
  });
  const float r = reciprocal_root(squares, C, eps);
  scale_row(x, 0.0f, r, weight, nullptr, C,
            [y](int64_t c, int64_t n, F value) { store(y + c, value, n); });
  *rstd = r;
}

}  // namespace

void rms_norm_fwd(int dtype, const void* x, const float* weight, void* y, float* rstd, int64_t N,
                  int64_t C, float eps, int threads) {
  const int team = team_size(N * C, kNormGrain, N, threads);
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t i = 0; i < N; ++i)
      rms_norm_fwd_row(from + i * C, weight, C, eps, to + i * C, rstd + i);
  });
}

void rms_norm_bwd(int dtype, const void* dy, const void* x, const float* weight, const float* rstd,
                  void* dx, float* dweight, int64_t N, int64_t C, int threads) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const T* d = static_cast<const T*>(dy);
    const T* z = static_cast<const T*>(x);
    T* out = static_cast<T*>(dx);
    norm_partitions(N, C, dweight, nullptr, 0, threads,
                    [&](int64_t i, auto count, float* dw, float*, float*) {
                      norm_bwd_rows<count.value, false>(
                          d + i * C, z + i * C, C, weight, nullptr, rstd + i, C, dw, nullptr,
                          [rows = out + i * C, C](int r, int64_t c, int64_t n, F dz) {
                            store(rows + r * C + c, dz, n);
                          });
                    });
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
