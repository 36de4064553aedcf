// The step between two blocks of a layer in one pass over memory; post-norm uses y, pre-norm y and
// z.
//
//   z = residual + dropout(x)
//   y = (z - mean) * rstd * weight + bias,   mean, var over the row,   rstd = 1 / sqrt(var + eps)
//
// backward, with dz the gradient that reaches z itself, xhat = (z - mean) * rstd, g = dy * weight:
//   dsum = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dz,   dresidual = dsum,
//   dx = dropout'(dsum)
//   dweight = sum over rows of dy * xhat,   dbias = sum over rows of dy
#include "dropout_add_layer_norm.h"

#include "norm.h"
#include "philox.h"
#include "scratch.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// z32 (C): the row of z in fp32; factors (C): dropout's factors, or null
template <typename T>
void dropout_add_layer_norm_fwd_row(const T* x, const T* residual, const float* weight,
                                    const float* bias, const float* factors, int64_t C, float eps,
                                    T* y, T* z, float* mean, float* rstd, float* z32) {
  const auto [total] = column_sums<1>(C, [&](int64_t c, int64_t n, int k, Chains* sums) {
    F value = load(x + c, n);
    if (factors) value = dropped(value, load(factors + c));
    value += load(residual + c, n);
    store(z32 + c, value);
    if (z) store(z + c, value, n);
    sums->of[k] += value;
  });
  norm_row(z32, total, weight, bias, C, eps, mean, rstd,
           [y](int64_t c, int64_t n, F value) { store(y + c, value, n); });
}

template <typename T>
void forward(const T* x, const T* residual, const float* weight, const float* bias, T* y, T* z,
             float* mean, float* rstd, int64_t N, int64_t C, float eps, const Dropout& dropout,
             int threads) {
  norm_rows(N, C, dropout, threads, [&](int64_t i, float* z32, const float* factors) {
    dropout_add_layer_norm_fwd_row(x + i * C, residual + i * C, weight, bias, factors, C, eps,
                                   y + i * C, z ? z + i * C : nullptr, mean + i, rstd + i, z32);
  });
}

template <typename T>
void backward(const T* dy, const T* z, const float* weight, const float* mean, const float* rstd,
              const T* dz, T* dx, T* dresidual, float* dweight, float* dbias, int64_t N, int64_t C,
              const Dropout& dropout, int threads) {
  const int64_t room = round_up(C, kPhiloxWords);
  norm_partitions(N, C, dweight, dbias, 2 * room, threads,
                  [&](int64_t i, auto count, float* dw, float* db, float* factors) {
                    constexpr int kRows = count.value;
                    const bool drops = dropout.enabled();
                    for (int r = 0; drops && r < kRows; ++r)
                      row_factors(dropout, i + r, C, factors + r * room);
                    norm_bwd_rows<kRows>(dy + i * C, z + i * C, C, weight, mean + i, rstd + i, C,
                                         dw, db, [=](int r, int64_t c, int64_t n, F dsum) {
                                           const int64_t at = (i + r) * C + c;
                                           if (dz) dsum += load(dz + at, n);
                                           store(dresidual + at, dsum, n);
                                           if (drops)
                                             dsum = dropped(dsum, load(factors + r * room + c));
                                           store(dx + at, dsum, n);
                                         });
                  });
}

}  // namespace

void dropout_add_layer_norm_fwd(int dtype, const void* x, const void* residual, const float* weight,
                                const float* bias, void* y, void* z, float* mean, float* rstd,
                                int64_t N, int64_t C, float eps, const int64_t* seed, uint32_t site,
                                uint32_t threshold, float scale, const int64_t* rows, int threads) {
  const Dropout dropout = {seed, site, threshold, scale, rows};
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    forward(static_cast<const T*>(x), static_cast<const T*>(residual), weight, bias,
            static_cast<T*>(y), static_cast<T*>(z), mean, rstd, N, C, eps, dropout, threads);
  });
}

void dropout_add_layer_norm_bwd(int dtype, const void* dy, const void* z, const float* weight,
                                const float* mean, const float* rstd, const void* dz, void* dx,
                                void* dresidual, float* dweight, float* dbias, int64_t N, int64_t C,
                                const int64_t* seed, uint32_t site, uint32_t threshold, float scale,
                                const int64_t* rows, int threads) {
  const Dropout dropout = {seed, site, threshold, scale, rows};
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    backward(static_cast<const T*>(dy), static_cast<const T*>(z), weight, mean, rstd,
             static_cast<const T*>(dz), static_cast<T*>(dx), static_cast<T*>(dresidual), dweight,
             dbias, N, C, dropout, threads);
  });
}

void philox_row(uint32_t* words, int64_t n, int64_t seed, uint32_t row, uint32_t site) {
  for (int64_t start = 0; start + kPhiloxWords <= n; start += kPhiloxWords) {
    U some[4];
    philox_words(seed, static_cast<uint32_t>(start / 4), row, site, 0, some);
    __builtin_memcpy(words + start, some, sizeof(some));
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
