// bias_gelu: exact erf or tanh; backward gives dx, its sum over the rows and, on request, gelu.
#include <algorithm>
#include <type_traits>

#include "columns.cuh"
#include "entries.h"

namespace fastbert {
namespace {

// rows that a thread loads at a time
constexpr int kForwardBatch = 4, kBackwardBatch = 2;

// (p, q) = (Phi(u), phi(u)), or for the tanh form s = sigmoid(z(u)) and its derivative:
// gelu = u p,  gelu' = p + u q
template <typename T, bool TANH>
__device__ inline float2 distribution(float u) {
  constexpr bool kExact = sizeof(T) == 4;
  if constexpr (TANH) {
    constexpr float kTwiceSqrt2Pi = 1.5957691216057308f, kCubic = 0.044715f;
    const float z = kTwiceSqrt2Pi * (u + kCubic * u * u * u);
    const float cdf = kExact ? 1.f / (1.f + expf(-z)) : __fdividef(1.f, 1.f + __expf(-z));
    const float slope = kTwiceSqrt2Pi * (1.f + 3.f * kCubic * u * u);
    return make_float2(cdf, cdf * (1.f - cdf) * slope);
  } else {
    constexpr float kRsqrt2 = 0.7071067811865476f, kRsqrt2Pi = 0.3989422804014327f;
    if constexpr (kExact)
      return make_float2(0.5f + 0.5f * erff(u * kRsqrt2), kRsqrt2Pi * expf(-0.5f * u * u));
    // erf to 1.5e-7 from the exponential of the density: Abramowitz, Stegun 7.1.26
    const float power = __expf(-0.5f * u * u);
    const float t = __fdividef(1.f, 1.f + 0.3275911f * kRsqrt2 * fabsf(u));
    float tail = 1.061405429f * t - 1.453152027f;
    tail = tail * t + 1.421413741f;
    tail = tail * t - 0.284496736f;
    tail = tail * t + 0.254829592f;
    tail *= 0.5f * t * power;
    return make_float2(u >= 0.f ? 1.f - tail : tail, kRsqrt2Pi * power);
  }
}

template <typename T, int N>
__device__ inline void load_bias(const Table& bias, int col, int F, bool wide, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = 0.f;
  if (bias.data) bias.load<T>(0, col, F, wide, values);
}

// y = gelu(x + bias)
template <typename T, bool TANH>
__global__ void __launch_bounds__(32 * kColumnThreads)
    bias_gelu_fwd_kernel(const T* __restrict__ x,  // (N, F)
                         Table bias,               // (F,), or null
                         T* __restrict__ y,        // (N, F)
                         int64_t N, int F, bool wide) {
  using C = Columns<T>;
  const int col = C::col();
  const int64_t first = C::first_row(), step = C::step();
  float b[C::kV];
  load_bias<T>(bias, col, F, wide, b);
  Pack<T, C::kV> packs[kForwardBatch];
#pragma unroll
  for (int r = 0; r < kForwardBatch; ++r) {
    const int64_t row = first + r * step;
    if (row < N) packs[r] = load_pack<C::kV>(x + row * F, col, F, wide);
  }
#pragma unroll
  for (int r = 0; r < kForwardBatch; ++r) {
    const int64_t row = first + r * step;
    if (row >= N) return;
    float out[C::kV];
#pragma unroll
    for (int i = 0; i < C::kV; ++i) {
      const float u = widen(packs[r].at[i]) + b[i];
      out[i] = u * distribution<T, TANH>(u).x;
    }
    store(y + row * F, col, F, wide, out);
  }
}

// dx = dy gelu'(x + bias), its sum over the block's rows, gelu(x + bias)
template <typename T, bool TANH>
__global__ void __launch_bounds__(32 * kColumnThreads)
    bias_gelu_bwd_kernel(const T* __restrict__ dy,     // (N, F)
                         const T* __restrict__ x,      // (N, F)
                         Table bias,                   // (F,), or null
                         T* __restrict__ dx,           // (N, F)
                         T* __restrict__ y,            // (N, F), or null
                         float* __restrict__ partial,  // (blocks, F), or null
                         int64_t N, int F, bool wide) {
  using C = Columns<T>;
  const int col = C::col();
  const int64_t step = C::step();
  float b[C::kV], sums[C::kV] = {};
  load_bias<T>(bias, col, F, wide, b);
  for (int64_t first = C::first_row(); first < N; first += kBackwardBatch * step) {
    Pack<T, C::kV> xs[kBackwardBatch], dys[kBackwardBatch];
#pragma unroll
    for (int r = 0; r < kBackwardBatch; ++r) {
      const int64_t row = first + r * step;
      if (row >= N) break;
      xs[r] = load_pack<C::kV>(x + row * F, col, F, wide);
      dys[r] = load_pack<C::kV>(dy + row * F, col, F, wide);
    }
#pragma unroll
    for (int r = 0; r < kBackwardBatch; ++r) {
      const int64_t row = first + r * step;
      if (row >= N) break;
      float out[C::kV], again[C::kV];
#pragma unroll
      for (int i = 0; i < C::kV; ++i) {
        const float u = widen(xs[r].at[i]) + b[i];
        const float2 at = distribution<T, TANH>(u);
        again[i] = u * at.x;
        out[i] = widen(dys[r].at[i]) * (at.x + u * at.y);
        sums[i] += out[i];
      }
      store(dx + row * F, col, F, wide, out);
      if (y) store(y + row * F, col, F, wide, again);
    }
  }
  if (partial) C::store_sums(sums, partial, F);
}

template <typename F>
void by_form(bool tanh, F run) {
  if (tanh)
    run(std::true_type{});
  else
    run(std::false_type{});
}

}  // namespace

void bias_gelu_fwd(int dtype, const void* x, const void* bias, int bias_dtype, void* y, int64_t N,
                   int64_t F, bool tanh, int device, cudaStream_t stream) {
  const Launch launch("bias_gelu_fwd", N, F, device, stream);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    using C = Columns<T>;
    const bool wide = aligned(F, C::kV, x, bias, y);
    by_form(tanh, [&](auto form) {
      bias_gelu_fwd_kernel<T, decltype(form)::value>
          <<<C::grid(cdiv(N, kForwardBatch * kColumnThreads), F), C::block(), 0, stream>>>(
              static_cast<const T*>(x), {bias, bias_dtype}, static_cast<T*>(y), N,
              static_cast<int>(F), wide);
    });
  });
  launch.check();
}

void bias_gelu_bwd(int dtype, const void* dy, const void* x, const void* bias, int bias_dtype,
                   void* dx, void* y, float* partial, void* sum, int sum_dtype, int blocks,
                   int64_t N, int64_t F, bool tanh, int device, cudaStream_t stream) {
  const Launch launch("bias_gelu_bwd", N, F, device, stream);
  by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    using C = Columns<T>;
    const bool wide = aligned(F, C::kV, dy, x, bias, dx, y);
    by_form(tanh, [&](auto form) {
      bias_gelu_bwd_kernel<T, decltype(form)::value><<<C::grid(blocks, F), C::block(), 0, stream>>>(
          static_cast<const T*>(dy), static_cast<const T*>(x), {bias, bias_dtype},
          static_cast<T*>(dx), static_cast<T*>(y), partial, N, static_cast<int>(F), wide);
    });
  });
  launch.check();
  if (partial) sum_partials(launch, partial, blocks, static_cast<int>(F), {sum, sum_dtype});
}

int column_blocks(int64_t N, int64_t F, int dtype, int multiprocessors) {
  int64_t most = 1;
  by_dtype(dtype, [&](auto t) {
    most = std::max<int64_t>(1, 4 * multiprocessors / cdiv(F, Columns<decltype(t)>::kWidth));
  });
  return static_cast<int>(std::min<int64_t>(cdiv(N, kColumnThreads), most));
}

}  // namespace fastbert
