// LayerNorm over the last dimension.
//
//   y = (x - mean) * rstd * weight + bias,   mean, var over the row,   rstd = 1 / sqrt(var + eps)
//
// backward, with xhat = (x - mean) * rstd and g = dy * weight:
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
//   dweight = sum over rows of dy * xhat,   dbias = sum over rows of dy
#include "layer_norm.h"

#include "norm.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

template <typename T>
void layer_norm_fwd_row(const T* x, const float* weight, const float* bias, int64_t C, float eps,
                        T* y, float* mean, float* rstd) {
  const auto [total] = column_sums<1>(
      C, [&](int64_t c, int64_t n, int k, Chains* sums) { sums->of[k] += load(x + c, n); });
  norm_row(x, total, weight, bias, C, eps, mean, rstd,
           [y](int64_t c, int64_t n, F value) { store(y + c, value, n); });
}

}  // namespace

void layer_norm_fwd(int dtype, const void* x, const float* weight, const float* bias, void* y,
                    float* mean, float* rstd, int64_t N, int64_t C, float eps, int threads) {
  const int team = team_size(N * C, kNormGrain, N, threads);
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t i = 0; i < N; ++i)
      layer_norm_fwd_row(from + i * C, weight, bias, C, eps, to + i * C, mean + i, rstd + i);
  });
}

void layer_norm_bwd(int dtype, const void* dy, const void* x, const float* weight,
                    const float* mean, const float* rstd, void* dx, float* dweight, float* dbias,
                    int64_t N, int64_t C, int threads) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const T* d = static_cast<const T*>(dy);
    const T* z = static_cast<const T*>(x);
    T* out = static_cast<T*>(dx);
    norm_partitions(
        N, C, dweight, dbias, 0, threads, [&](int64_t i, auto count, float* dw, float* db, float*) {
          norm_bwd_rows<count.value>(d + i * C, z + i * C, C, weight, mean + i, rstd + i, C, dw, db,
                                     [rows = out + i * C, C](int r, int64_t c, int64_t n, F dz) {
                                       store(rows + r * C + c, dz, n);
                                     });
        });
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
