// BERT's post-LN step in one pass over memory.
//
//   z = residual + dropout(x)
//   y = (z - mean) * rstd * weight + bias,   mean, var over the row,   rstd = 1 / sqrt(var + eps)
//
// backward, with xhat = (z - mean) * rstd and g = dy * weight:
//   dz = rstd * (g - mean(g) - xhat * mean(g * xhat)),   dresidual = dz,   dx = dropout'(dz)
//   dweight = sum over rows of dy * xhat,   dbias = sum over rows of dy
#include "dropout_add_layer_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dtype.h"
#include "reduce.h"

namespace fastbert {
namespace {

// below this many elements a second thread costs more than it computes
constexpr int64_t kElementsPerThread = 16384;
// dweight and dbias are summed in at most this many partitions of rows, whatever the thread count
constexpr int64_t kMaxPartitions = 128;
constexpr int64_t kMinRowsPerPartition = 16;

int useful_threads(int64_t elements, int64_t tasks, int threads) {
  const int64_t useful = std::min(elements / kElementsPerThread, tasks);
  return static_cast<int>(std::clamp<int64_t>(useful, 1, std::max(threads, 1)));
}

// a select and not a product: what is dropped is 0 even where the value is inf or NaN
inline float dropped(float value, float factor) { return factor != 0.0f ? value * factor : 0.0f; }

// buffer (2C): room for z in fp32 and for the dropout factors
template <typename T>
void dropout_add_layer_norm_fwd_row(const T* x, const T* residual, const float* weight,
                                    const float* bias, const Dropout& dropout, int64_t row,
                                    int64_t C, float eps, T* y, T* z, float* mean, float* rstd,
                                    float* buffer) {
  float* z32 = buffer;
  float* factors = buffer + C;
  if (dropout.enabled) {
    dropout.row_factors(row, C, factors);
    for (int64_t c = 0; c < C; ++c) z32[c] = load(residual + c) + dropped(load(x + c), factors[c]);
  } else {
    for (int64_t c = 0; c < C; ++c) z32[c] = load(residual + c) + load(x + c);
  }
  if (z)
    for (int64_t c = 0; c < C; ++c) store(z + c, z32[c]);

  // centred second pass: E[z^2] - mean^2 cancels
  const float m = lane_sum(C, [=](int64_t c) { return z32[c]; }) / static_cast<float>(C);
  const float squares = lane_sum(C, [=](int64_t c) { return (z32[c] - m) * (z32[c] - m); });
  const float r = 1.0f / std::sqrt(squares / static_cast<float>(C) + eps);
  for (int64_t c = 0; c < C; ++c) store(y + c, (z32[c] - m) * r * weight[c] + bias[c]);
  *mean = m;
  *rstd = r;
}

// Adds the row's share to dweight and dbias. buffer (3C): room for xhat, g and the dropout factors
template <typename T>
void dropout_add_layer_norm_bwd_row(const T* dy, const T* z, const float* weight, float mean,
                                    float rstd, const Dropout& dropout, int64_t row, int64_t C,
                                    T* dx, T* dresidual, float* dweight, float* dbias,
                                    float* buffer) {
  float* xhat = buffer;
  float* g = buffer + C;
  float* factors = buffer + 2 * C;
  for (int64_t c = 0; c < C; ++c) {
    const float d = load(dy + c);
    const float h = (load(z + c) - mean) * rstd;
    xhat[c] = h;
    g[c] = d * weight[c];
    dweight[c] += d * h;
    dbias[c] += d;
  }
  const float n = static_cast<float>(C);
  const float mean_g = lane_sum(C, [=](int64_t c) { return g[c]; }) / n;
  const float mean_gx = lane_sum(C, [=](int64_t c) { return g[c] * xhat[c]; }) / n;
  for (int64_t c = 0; c < C; ++c) {
    g[c] = rstd * (g[c] - mean_g - xhat[c] * mean_gx);
    store(dresidual + c, g[c]);
  }
  if (dropout.enabled) {
    dropout.row_factors(row, C, factors);
    for (int64_t c = 0; c < C; ++c) store(dx + c, dropped(g[c], factors[c]));
  } else {
    for (int64_t c = 0; c < C; ++c) store(dx + c, g[c]);
  }
}

}  // namespace

template <typename T>
void dropout_add_layer_norm_fwd(const T* x, const T* residual, const float* weight,
                                const float* bias, const Dropout& dropout, T* y, T* z, float* mean,
                                float* rstd, int64_t N, int64_t C, float eps, int threads) {
  const int team = useful_threads(N * C, N, threads);
  // one allocation before the parallel region, which no exception may leave
  std::vector<float> buffers(static_cast<size_t>(team) * 2 * C);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int part = 0; part < team; ++part) {
    float* buffer = buffers.data() + static_cast<size_t>(part) * 2 * C;
    for (int64_t i = part * N / team; i < (part + 1) * N / team; ++i)
      dropout_add_layer_norm_fwd_row(x + i * C, residual + i * C, weight, bias, dropout, i, C, eps,
                                     y + i * C, z ? z + i * C : nullptr, mean + i, rstd + i,
                                     buffer);
  }
}

template <typename T>
void dropout_add_layer_norm_bwd(const T* dy, const T* z, const float* weight, const float* mean,
                                const float* rstd, const Dropout& dropout, T* dx, T* dresidual,
                                float* dweight, float* dbias, int64_t N, int64_t C, int threads) {
  const int64_t parts =
      std::clamp<int64_t>((N + kMinRowsPerPartition - 1) / kMinRowsPerPartition, 1, kMaxPartitions);
  const int team = useful_threads(N * C, parts, threads);
  // each partition has its own sums of dweight and dbias and its own room to work
  const size_t stride = static_cast<size_t>(5 * C);
  std::vector<float> partials(static_cast<size_t>(parts) * stride);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    float* sums = partials.data() + static_cast<size_t>(part) * stride;
    for (int64_t i = part * N / parts; i < (part + 1) * N / parts; ++i)
      dropout_add_layer_norm_bwd_row(dy + i * C, z + i * C, weight, mean[i], rstd[i], dropout, i, C,
                                     dx + i * C, dresidual + i * C, sums, sums + C, sums + 2 * C);
  }
  std::fill(dweight, dweight + C, 0.0f);
  std::fill(dbias, dbias + C, 0.0f);
  for (int64_t part = 0; part < parts; ++part) {
    const float* sums = partials.data() + static_cast<size_t>(part) * stride;
    for (int64_t c = 0; c < C; ++c) {
      dweight[c] += sums[c];
      dbias[c] += sums[C + c];
    }
  }
}

#define FASTBERT_INSTANTIATE(T)                                                                \
  template void dropout_add_layer_norm_fwd<T>(const T*, const T*, const float*, const float*,  \
                                              const Dropout&, T*, T*, float*, float*, int64_t, \
                                              int64_t, float, int);                            \
  template void dropout_add_layer_norm_bwd<T>(const T*, const T*, const float*, const float*,  \
                                              const float*, const Dropout&, T*, T*, float*,    \
                                              float*, int64_t, int64_t, int);

FASTBERT_INSTANTIATE(float)
FASTBERT_INSTANTIATE(bf16)

}  // namespace fastbert
