// y = gelu(x + bias);   dx = dy gelu'(x + bias),   dbias = sum over rows of dx
//
// x + bias is never rounded to bf16, and dbias sums dx before it is rounded.
#include "bias_gelu.h"

#include "math.h"
#include "scratch.h"

namespace fastbert {
namespace FASTBERT_ISA {
namespace {

// elements per thread: fewer do not pay for starting one
constexpr int64_t kGrain = 8192;
// dbias is summed in at most this many partitions of at least kRows rows, whatever the thread count
constexpr int64_t kPartitions = 64;
constexpr int64_t kRows = 16;

template <Activation kForm, typename T>
void bias_gelu_fwd_row(const T* x, const float* bias, int64_t C, T* y) {
  int64_t c = 0;
  for (; c + W <= C; c += W) store(y + c, activate<kForm>(load(x + c) + load(bias + c)).value);
  if (c < C) store(y + c, activate<kForm>(load(x + c, C - c) + load(bias + c)).value, C - c);
}

// adds the row's dx to dbias; bias and dbias have room for round_up(C, W) floats
template <Activation kForm, typename T>
void bias_gelu_bwd_row(const T* dy, const T* x, const float* bias, int64_t C, T* dx, float* dbias) {
  int64_t c = 0;
  for (; c + W <= C; c += W) {
    const F d = load(dy + c) * activate<kForm>(load(x + c) + load(bias + c)).derivative;
    store(dx + c, d);
    store(dbias + c, load(dbias + c) + d);
  }
  if (c < C) {
    const int64_t n = C - c;
    const F d = load(dy + c, n) * activate<kForm>(load(x + c, n) + load(bias + c)).derivative;
    store(dx + c, d, n);
    store(dbias + c, load(dbias + c) + d);
  }
}

// bias (C), or zeros if it is null, padded with zeros to whole vectors
void pad(const float* bias, int64_t C, float* padded) {
  for (int64_t c = 0; c < C; c += W) store(padded + c, bias ? load(bias + c, C - c) : zero());
}

template <Activation kForm, typename T>
void forward(const T* x, const float* bias, T* y, int64_t N, int64_t C, int threads) {
  const int team = team_size(N * C, kGrain, N, threads);
  const Scratch padded(1, round_up(C, W));
  pad(bias, C, padded[0]);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t i = 0; i < N; ++i) bias_gelu_fwd_row<kForm>(x + i * C, padded[0], C, y + i * C);
}

template <Activation kForm, typename T>
void backward(const T* dy, const T* x, const float* bias, T* dx, float* dbias, int64_t N, int64_t C,
              int threads) {
  const int64_t parts = imax(1, imin(kPartitions, N / kRows));
  const int team = team_size(N * C, kGrain, parts, threads);
  const Scratch padded(1, round_up(C, W));
  pad(bias, C, padded[0]);
  const Scratch sums(parts, round_up(C, W));
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t c = 0; c < C; c += W) store(sums[part] + c, zero());
    for (int64_t i = part * N / parts; i < (part + 1) * N / parts; ++i)
      bias_gelu_bwd_row<kForm>(dy + i * C, x + i * C, padded[0], C, dx + i * C, sums[part]);
  }
  if (!dbias) return;
  for (int64_t c = 0; c < C; c += W) {
    F total = zero();
    for (int64_t part = 0; part < parts; ++part) total += load(sums[part] + c);
    store(dbias + c, total, C - c);
  }
}

}  // namespace

void bias_gelu_fwd(int dtype, const void* x, const float* bias, void* y, int64_t N, int64_t C,
                   int activation, int threads) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    with_gelu(activation, [&](auto form) {
      forward<decltype(form)::value>(static_cast<const T*>(x), bias, static_cast<T*>(y), N, C,
                                     threads);
    });
  });
}

void bias_gelu_bwd(int dtype, const void* dy, const void* x, const float* bias, void* dx,
                   float* dbias, int64_t N, int64_t C, int activation, int threads) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    with_gelu(activation, [&](auto form) {
      backward<decltype(form)::value>(static_cast<const T*>(dy), static_cast<const T*>(x), bias,
                                      static_cast<T*>(dx), dbias, N, C, threads);
    });
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
